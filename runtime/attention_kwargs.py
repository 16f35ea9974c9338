"""What pipelines pass to a transformer's attention: the scale of adapters, and what no pruned step takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from cat_pruning.checked import shown
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import SettingsError
from cat_pruning.runtime.adapters import Adapters

_NAMES: Final = ("joint_attention_kwargs", "cross_attention_kwargs")  # by which diffusers' transformers take them


def split_attention_kwargs(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The arguments of a call with those for the attention laid flat, under their own names, and the adapters' scale.

    `joint_attention_kwargs={"scale": 0.5, "ip_adapter_masks": masks}` gives `joint_attention_kwargs[ip_adapter_masks]`
    and 0.5; without a scale it is 1.

    Raises:
        SettingsError: the scale is no finite number.
    """
    flat, scale = dict(arguments), 1.0
    for name in _NAMES:
        if isinstance(given := flat.get(name), Mapping):
            del flat[name]
            flat |= {f"{name}[{key}]": value for key, value in given.items() if key != "scale"}
            scale = _number(name, given.get("scale", 1.0))
    return flat, scale


def _number(name: str, scale: Any) -> float:
    try:
        number = math.nan if isinstance(scale, str | bytes) else float(scale)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is a tensor's of several numbers
        number = math.nan
    if not math.isfinite(number):
        raise SettingsError(f"{name}: scale={shown(scale)}: expected a finite number")
    return number


@contextmanager
def scaled_adapters(adapters: Adapters, scale: float) -> Iterator[None]:
    """Compute with every adapter's scale times `scale`, as diffusers' transformers do for the time of a call.

    Raises:
        SettingsError: adapters are loaded in an engine that has them in its weights.
    """
    if scale == 1.0 or not adapters.layers:
        yield
        return
    if not isinstance(adapters.engine, TorchStepEngine):
        raise SettingsError(
            f"joint_attention_kwargs: scale={scale:g}: the engine {adapters.engine.name} has adapters in its weights",
            "give the scale to pipe.set_adapters(names, scale) instead",
        )
    from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

    scale_lora_layers(adapters.module, scale)
    try:
        yield
    finally:
        unscale_lora_layers(adapters.module, scale)
