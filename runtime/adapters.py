"""Which adapters are loaded, at which scales, and the weights that follow: W + Σ scale · B A (Hu et al. 2021).

Diffusers and PEFT keep the adapters, in a transformer whose own weights are single zeros, expanded: names, alphas,
scales and formats mean what they mean in diffusers. Changed weights are always computed from those that the export
wrote, in fp32 and rounded once; nothing is ever subtracted. So what is loaded decides the weights to the bit,
whatever was loaded before.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cat_pruning.checkpoints.library_logs import first_line, quiet_diffusers
from cat_pruning.checkpoints.lora import check_adapter, read_peft_directory
from cat_pruning.engines.graph_weights import GraphWeights
from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import CatError, CheckpointError, EngineError, SettingsError
from cat_pruning.finite import is_finite
from cat_pruning.imports import diffusers_class
from cat_pruning.installation import require


class Adapters:
    """The adapters over one engine's weights. Changes come one at a time, from any thread.

    Args:
        engine: whose weights they change. The torch engine's module takes them itself, as in diffusers.
    """

    def __init__(self, engine: StepEngine) -> None:
        self.engine = engine
        self._lock = threading.RLock()
        self._module: Any = engine.transformer if isinstance(engine, TorchStepEngine) else None
        self._has_others = False  # a file had weights for other parts of the pipeline only

    @property
    def module(self) -> Any:
        """The diffusers module that keeps the adapters.

        Raises:
            EngineError: the engine's weights cannot be changed.
        """
        if self._module is None:
            self.engine.base_weights()
            self._module = _without_weights(self.engine.family.transformer_class, self.engine.family.config)
        return self._module

    @property
    def loaded(self) -> dict[str, Any]:
        """The adapters' PEFT configurations by name."""
        return dict(getattr(self._module, "peft_config", None) or {})

    @property
    def active(self) -> list[str]:
        """The names of the adapters in use."""
        return list(self.layers[0].active_adapters) if self.layers else []

    @property
    def layers(self) -> list[Any]:
        """The layers of PEFT that hold the adapters."""
        return [] if self._module is None or not self.loaded else [layer for _, layer in _layers(self._module)]

    def load(self, adapter: Any, prefix: str | None, options: dict[str, Any]) -> None:
        """Load an adapter and make it the active one: see diffusers' `load_lora_adapter`.

        Raises:
            EngineError: the engine's weights cannot be changed, or not to these.
            CheckpointError: the adapter is damaged, incomplete, or of another model, be it in part.
            SettingsError: the name is taken.
            InstallationError: PEFT is not installed.
        """
        require("load_lora_adapter", "lora")
        with self._lock:
            module, before = self.module, set(self.loaded)
            active = self.active
            if not hasattr(module, "load_lora_adapter"):
                raise SettingsError(
                    f"diffusers loads no adapters into a {type(module).__name__}",
                    "fuse a PEFT directory with cat-export --lora",
                )
            if (name := options.get("adapter_name")) in before and not options.get("hotswap"):
                raise SettingsError(f"an adapter {name!r} is loaded already", "give another adapter_name, or unload it")
            try:
                with quiet_diffusers(errors=False), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PEFT's, of a second adapter
                    adapter, prefix, options = self._read(adapter, prefix, options)
                    module.load_lora_adapter(adapter, prefix=prefix, **options)
                for new in set(self.loaded) - before:
                    self._check_kind(new)
                self._apply()
            except BaseException as error:
                self._restore(before, active)
                with contextlib.suppress(CatError):  # back to what was there, if it did get that far
                    self._apply()
                if isinstance(error, CatError) or not isinstance(error, Exception):
                    raise
                raise self._unfit(options.get("adapter_name"), first_line(error)) from error

    def _read(
        self, adapter: Any, prefix: str | None, options: dict[str, Any]
    ) -> tuple[dict[str, Tensor], str | None, dict[str, Any]]:
        """The weights in fp32, checked; what belongs to other parts of the pipeline is left out."""
        if isinstance(adapter, str | Path):
            if not (Path(adapter) / "adapter_config.json").is_file():
                raise ValueError(f"{adapter} is no directory of PEFT's; load files with pipe.load_lora_weights")
            weights, metadata = read_peft_directory(Path(adapter))
            adapter, prefix, options = weights, None, {**options, "metadata": metadata}
        start = "" if prefix is None else f"{prefix}."
        ours = {name: weight for name, weight in adapter.items() if name.startswith(start)}
        others = [name for name in adapter if name not in ours]
        if unknown := [name for name in others if not name.startswith("text_encoder")]:
            raise ValueError(
                f"its {unknown[0]} belongs to no part of the pipeline; of a PEFT directory, "
                "pipe.transformer.load_lora_adapter(directory) knows the scale"
            )
        self._has_others |= not ours
        if ours or not others:
            check_adapter({name.removeprefix(start): weight for name, weight in ours.items()}, self.module)
        return {name: weight.float() for name, weight in ours.items()}, prefix, options

    def _check_kind(self, name: str) -> None:
        if isinstance(self.engine, TorchStepEngine):
            return
        config = self.loaded[name]
        for kind, what in (("use_dora", "DoRA"), ("lora_bias", "biases"), ("modules_to_save", "whole modules")):
            if getattr(config, kind, None):
                raise self._unfit(name, f"it has {what}, which only the torch engine and cat-export --lora take")

    def _unfit(self, name: str | None, reason: str) -> CheckpointError:
        called = f"the adapter {name}" if name else "the adapter"
        return CheckpointError(
            f"{called} cannot be loaded into this {self.engine.family.transformer_class} ({reason})",
            "give a LoRA of this model",
        )

    def _restore(self, names: set[str], active: list[str]) -> None:
        """Forget every adapter but these, also one that was loaded in part."""
        if not names and not isinstance(self.engine, TorchStepEngine):
            self._module = None
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for new in set(self.loaded) - names:
                self._module.delete_adapters(new)
            for _, layer in _layers(self._module):
                for new in layer._get_available_adapters() - names:
                    layer.delete_adapter(new)
                layer.set_adapter(active)

    def change(self, method: str, *arguments: Any, **options: Any) -> None:
        """Do to the adapters what diffusers' method of this name does, and to the engine's weights what follows.

        Raises:
            EngineError: the engine's weights cannot be changed, or not to these.
            CheckpointError: a weight would overflow its dtype; nothing is changed then.
        """
        with self._lock:
            if method == "unload_lora":
                self._has_others = False
            if self._module is None:  # nothing was ever loaded
                return
            scales = [(layer, dict(layer.scaling), list(layer.active_adapters)) for layer in self.layers]
            getattr(self._module, method)(*arguments, **options)
            try:
                self._apply()
            except CheckpointError:
                for layer, scaling, active in scales:
                    layer.scaling.update(scaling)
                    layer.set_adapter(active)
                self._apply()
                raise

    def set_active(self, names: list[str], scales: Any) -> None:
        """Make these adapters the active ones: see diffusers' `set_adapters`.

        Raises:
            SettingsError: no adapter of a name is loaded.
            EngineError: the engine's weights cannot be changed, or not to these.
        """
        if (unknown := [name for name in names if name not in self.loaded]) and not self._has_others:
            has = ", ".join(self.loaded) or "none"
            raise SettingsError(
                f"no adapter {unknown[0]!r} is loaded; loaded: {has}", "pipe.load_lora_weights loads one"
            )
        self.change("set_adapters", names, scales)

    def _apply(self) -> None:
        if isinstance(self.engine, TorchStepEngine):
            return
        if self._module is None:
            self.engine.set_weights({})
        else:
            self.engine.set_weights(AdaptedWeights(self.engine.base_weights(), self._module))


class AdaptedWeights(Mapping[str, Tensor]):
    """The initializers that the active adapters change, by name; each computed when it is asked for.

    Args:
        base: the weights of the export.
        module: what keeps the adapters.

    Raises:
        EngineError: an adapted parameter is in no graph.
        CheckpointError: when it is asked for, an initializer that overflows its dtype.
    """

    def __init__(self, base: GraphWeights, module: nn.Module) -> None:
        self._base = base
        self._layers: dict[str, Any] = {}
        for name, layer in _layers(module):
            if _active(layer):
                names = base.initializers(f"{name}.weight")
                if not names:
                    raise EngineError(
                        f"the graphs have no {name}.weight, which the adapter changes", "cat-export --lora"
                    )
                self._layers |= dict.fromkeys(names, layer)

    def __getitem__(self, name: str) -> Tensor:
        """The changed initializer, new memory on the CPU."""
        layer = self._layers[name]
        with torch.inference_mode(False), torch.no_grad():
            changes = (layer.get_delta_weight(adapter).float() for adapter in _active(layer))
            changed = self._base.changed(name, functools.reduce(torch.add, changes))
        if not is_finite(changed):
            scales = ", ".join(f"{adapter} at {layer.scaling[adapter]:g}" for adapter in _active(layer))
            raise CheckpointError(f"with the adapters {scales}, {name} overflows {changed.dtype}", "scale them down")
        return changed

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._layers)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._layers)


def _layers(module: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]


def _active(layer: Any) -> list[str]:
    """The adapters that change a layer's weight."""
    if layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if layer.scaling.get(name)]


def empty_module(transformer_class: str, config: Mapping[str, Any]) -> Any:
    """A diffusers transformer on torch's device "meta": its weights have shapes and no values."""
    cls = diffusers_class(transformer_class)
    with torch.device("meta"):
        return cls(**cls.extract_init_dict(dict(config))[0])


def _without_weights(transformer_class: str, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers transformer for adapters to lie in: its parameters take no memory, it cannot run."""
    module: nn.Module = empty_module(transformer_class, config)
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        # PEFT gives an adapter the device and the dtype of its layer, so these are the CPU and fp32.
        values = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
        setattr(module.get_submodule(owner), leaf, values)
    return module.eval()
