"""The process that builds one plan: a `PlanJob` as JSON on standard input, a `PlanReport` as JSON on standard output.

One code for TensorRT and TensorRT-RTX. The plan is streamed into its file while it is serialised, so that it never
lies in memory as a whole. TensorRT's plan is then loaded once, and the engine asked what it runs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_pruning.engines.build_caches import read_cache, write_cache
from cat_pruning.engines.profiles import PlanProfile
from cat_pruning.engines.records import Flavour
from cat_pruning.engines.tensorrt_library import Log, first_error, library_log, tensorrt_library
from cat_pruning.errors import EngineError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanJob:
    """What to build.

    onnx, plan: files. profiles: (min, opt, max) of every input by name, per profile.
    plugin_nodes: how many nodes of each operator our plugins serve; nothing is registered where there are none.
    timing_cache: a file to read and write, of TensorRT; TensorRT-RTX measures nothing.
    refittable: weights can be replaced in the engine, by their initializers' names.
    """

    flavour: Flavour
    onnx: str
    plan: str
    profiles: Sequence[PlanProfile]
    plugin_nodes: Mapping[str, int]
    timing_cache: str | None
    refittable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What was built: all layers of the engine and those that are plugins; None for TensorRT-RTX, which was not asked.

    A layer counts once for every profile.
    """

    engine_layers: int | None = None
    engine_plugins: int | None = None


def build(job: PlanJob) -> PlanReport:
    """Build the plan, and look into TensorRT's.

    Raises:
        EngineError: the library is not there or refused the graph, in its own words; or it took no plugins.
        OSError: the plan cannot be written.
    """
    trt = tensorrt_library(job.flavour)
    log = library_log(trt)
    with log.collected() as errors:
        try:
            _build_plan(trt, log, job)
            return PlanReport() if job.flavour == "tensorrt_rtx" else _inspect(trt, log, Path(job.plan))
        except (RuntimeError, TypeError, ValueError) as error:  # of the bindings, TypeError for a null pointer
            raise EngineError(first_error(errors, str(error))) from error


def _build_plan(trt: Any, log: Log, job: PlanJob) -> None:
    flags = [trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED]  # in 11, what every network is
    if job.plugin_nodes:
        _register_plugins(trt)
        flags.append(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    builder = trt.Builder(log.handle)
    network = builder.create_network(sum(1 << int(flag) for flag in flags))
    parser = trt.OnnxParser(network, log.handle)  # owns the weights that the network refers to, so it lives as long
    with log.collected() as errors:
        if not parser.parse_from_file(job.onnx):  # the log names the file or node, the parser what is wrong with it
            words = dict.fromkeys((*errors[:1], str(parser.get_error(0))))
            raise EngineError(first_error([" ".join(words)], ""))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    _check_plugins(sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers), job.plugin_nodes, trt.__version__)
    for layer in layers:
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # Where there is no fused kernel (fp32, some head widths), several kernels instead of no engine.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    config = _config(trt, builder, job)
    timings = _timing_cache(config, Path(job.timing_cache)) if job.timing_cache else None
    _serialise(trt, builder, network, config, Path(job.plan))
    if job.timing_cache and timings is not None:
        write_cache(Path(job.timing_cache), bytes(timings.serialize()))


def _register_plugins(trt: Any) -> None:
    try:
        from cat_pruning.plugins.tensorrt_plugin import register_token_plugins
    except ImportError as error:
        raise EngineError(
            f"the token plugin cannot be made here ({error}); pip install 'cat-pruning[tensorrt]', or --no-plugin"
        ) from error
    register_token_plugins(trt)


def _check_plugins(found: int, expected: Mapping[str, int], version: str) -> None:
    """That the parser took a plugin for each of our nodes: it prefers their function bodies without a word."""
    if found != sum(expected.values()):
        nodes = ", ".join(f"{count} {operator}" for operator, count in expected.items())
        raise EngineError(
            f"the plugin was asked for, and TensorRT {version} took the function bodies of the token operators "
            f"instead: {found} plugin layers, expected {sum(expected.values())} ({nodes}); build with --no-plugin, "
            "which needs none"
        )


def _config(trt: Any, builder: Any, job: PlanJob) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector knows layers by name only
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is what was asked for, and what torch computes
    if job.flavour == "tensorrt_rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or a step may not be captured as a CUDA graph
    if job.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if job.plugin_nodes:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)  # scattered in place
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, (lowest, best, highest) in shapes.items():
            profile.set_shape(name, lowest, best, highest)
        if config.add_optimization_profile(profile) < 0:
            raise RuntimeError("it refused the shapes of a profile")
    return config


def _timing_cache(config: Any, path: Path) -> Any:
    """The timings of earlier builds, or none yet, attached to `config`."""
    cache = config.create_timing_cache(read_cache(path) or b"")
    if cache is None or not config.set_timing_cache(cache, False):
        logger.warning("%s is not of this TensorRT on this GPU and is ignored", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _serialise(trt: Any, builder: Any, network: Any, config: Any, plan: Path) -> None:
    class PlanFile(trt.IStreamWriter):  # type: ignore[misc]  # from an untyped module
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.file = plan.open("wb")
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return self.file.write(data)
            except OSError as error:  # must not cross the builder's frames
                self.error = error
                return 0

    output = PlanFile()
    with output.file:
        built = builder.build_serialized_network_to_stream(network, config, output)
    if output.error is not None:
        raise output.error
    if not built:
        raise RuntimeError("the builder refused the graph")


def _inspect(trt: Any, log: Log, plan: Path) -> PlanReport:
    """Load the plan, which nothing else here has run, and count its engine's layers."""
    with plan.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    runtime = trt.Runtime(log.handle)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise RuntimeError("the plan was built and cannot be loaded")
    inspector = engine.create_engine_inspector()
    return count_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def count_layers(information: str) -> PlanReport:
    """The layers of an engine, from what the inspector says of it in JSON."""
    layers = json.loads(information)["Layers"]
    kinds = [str(entry.get("LayerType")) for entry in layers if isinstance(entry, dict)]
    return PlanReport(engine_layers=len(layers), engine_plugins=sum(kind.startswith("Plugin") for kind in kinds))


def main() -> int:
    """Build the job on standard input; 0 when it is built."""
    logging.basicConfig(level=os.environ.get("CAT_PRUNING_LOG", "WARNING").upper())
    job = PlanJob(**json.load(sys.stdin))
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries log there too
    try:
        built = build(job)
    except OSError as error:
        report.write(json.dumps({"errno": error.errno, "problem": error.strerror}) + "\n")
        return 1
    except EngineError as error:
        report.write(json.dumps({"problem": str(error)}) + "\n")
        return 1
    report.write(json.dumps(dataclasses.asdict(built)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
