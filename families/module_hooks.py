"""What diffusers and accelerate hook onto a transformer's parts, which an intercepted copy of it would lose."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from cat_pruning.errors import SettingsError

# Of linear layers alone, which the interception leaves as they are.
LAYERWISE_CASTING: Final = "layerwise_casting"


def check_hooks(transformer: nn.Module) -> None:
    """That no part has hooks that a copy would lose: those of diffusers call the original's own parts.

    Raises:
        SettingsError: group or sequential offloading, or one of diffusers' caches.
    """
    if names := sorted(hooks_of(transformer) - {LAYERWISE_CASTING}):
        raise SettingsError(
            f"the transformer has hooks that pruned steps would pass by ({', '.join(names)})",
            "take them off, as disable_cache() does; enable_model_cpu_offload works",
        )


def hooks_of(transformer: nn.Module) -> set[str]:
    """The names of the hooks on a module's parts: diffusers' own, and accelerate's where it offloads parts."""
    names: set[str] = set()
    for part in transformer.modules():
        registry: Any = getattr(part, "_diffusers_hook", None)
        names |= set(registry.hooks) if registry is not None else set()
        if getattr(getattr(part, "_hf_hook", None), "offload", False):
            names.add("sequential offload")
    return names
