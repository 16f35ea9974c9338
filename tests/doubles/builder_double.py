"""A double of TensorRT's builder: the real TensorRT-RTX, changed in what only TensorRT has.

Plugins, refusals of fused attention, and a GPU to load the plan on: those are played. The rest is the same API by
another name, and does the work.
"""

from __future__ import annotations

import json
from types import ModuleType, SimpleNamespace
from typing import Any

from recorded_names import Recorded

from cat_pruning.engines.tensorrt_library import tensorrt_library

LAYERS = {"Layers": [{"Name": "a", "LayerType": "gemm"}, {"Name": "b", "LayerType": "PluginV3"}, "c"], "Bindings": []}


class Tensorrt(ModuleType):
    """TensorRT-RTX as TensorRT; `asked` is what the builder asked of it, in order."""

    def __init__(self, plugins: bool) -> None:
        super().__init__("tensorrt")
        rtx, asked = tensorrt_library("tensorrt_rtx"), []
        vars(self).update({name: value for name, value in vars(rtx).items() if name != "__name__"})
        self.__version__ = "11.4.0"
        self.asked: list[str] = asked
        self.used: set[str] = set()  # names of the API that are played; see `recorded_names` for the others
        self.callback_errors: list[str] = []
        self.loads = True
        self.information = json.dumps(LAYERS)
        self.refusals = 0  # of the builds that come next
        self.refusal = "Could not find any implementation for node {ForeignNode}"
        strongly_typed = rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED

        def played(of: str, **attributes: Any) -> Any:
            return Recorded(SimpleNamespace(**attributes), of, self.used)

        def builder(log: Any) -> Any:
            real = rtx.Builder(log)

            def create_network(flags: int) -> Any:
                asked.append(f"network {flags:b}")
                return real.create_network(1 << int(strongly_typed))

            def create_builder_config() -> Any:
                asked.append("config")
                return real.create_builder_config()

            def build_serialized_network_to_stream(network: Any, config: Any, writer: Any) -> bool:
                aliased = config.get_preview_feature(rtx.PreviewFeature.ALIASED_PLUGIN_IO_10_03)
                asked.append(f"build, aliased {aliased}, {config.profiling_verbosity.name}")
                asked.append(f"tf32 {config.get_flag(rtx.BuilderFlag.TF32)}")
                if config.get_flag(rtx.BuilderFlag.REFIT):
                    asked.append("refit")
                    config.clear_flag(rtx.BuilderFlag.REFIT)  # which the real one builds with a GPU only
                asked.append(f"decomposable {decomposable(network)}")
                if self.refusals:
                    self.refusals -= 1
                    log.log(rtx.ILogger.Severity.ERROR, self.refusal)
                    return False
                return bool(real.build_serialized_network_to_stream(network, config, writer))

            return SimpleNamespace(
                create_network=create_network,
                create_builder_config=create_builder_config,
                create_optimization_profile=real.create_optimization_profile,
                build_serialized_network_to_stream=build_serialized_network_to_stream,
            )

        def deserialize(plan: Any) -> Any:
            asked.append(f"load {len(plan)} bytes")
            inspector = played("EngineInspector", get_engine_information=lambda form: self.information)
            engine = played("ICudaEngine", create_engine_inspector=lambda: inspector, device_memory_size_v2=4096)
            return engine if self.loads else None

        def decomposable(network: Any) -> list[bool]:
            """What every attention of a network is marked with."""
            found = set()
            for index in range(network.num_layers):
                if (layer := network.get_layer(index)).type == rtx.LayerType.ATTENTION_INPUT:
                    layer.__class__ = rtx.IAttentionInputLayer
                    found.add(bool(layer.attention.decomposable))
            return sorted(found)

        self.Builder = builder
        self.Runtime = lambda log: played("Runtime", deserialize_cuda_engine=deserialize)
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1, PREFER_AOT_PYTHON_PLUGINS=3)
        self.LayerType = SimpleNamespace(
            ATTENTION_INPUT=rtx.LayerType.ATTENTION_INPUT,
            # The node of a function body that stands for a plugin's: of the one token operator of `scatter_job`.
            PLUGIN_V3=rtx.LayerType.SCATTER if plugins else rtx.LayerType.PLUGIN_V3,
        )
