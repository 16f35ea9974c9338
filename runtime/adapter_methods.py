"""What diffusers' pipelines call on a transformer to load, scale and unload adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import SettingsError

if TYPE_CHECKING:
    from cat_pruning.runtime.adapters import Adapters


class AdapterMethods:
    """`pipe.load_lora_weights`, `set_adapters`, `unload_lora_weights` and the like, on an engine's weights.

    Every change holds from the next image on; of an image in progress in this thread, from its next step, which is
    a full one. The torch engine's adapters are its module's own: do not change them while other threads generate.
    """

    adapters: Adapters

    def reset(self) -> None:
        """Forget this thread's image in progress."""
        raise NotImplementedError

    def load_lora_adapter(self, adapter: Any, prefix: str | None = "transformer", **options: Any) -> None:
        """Load an adapter and activate it; `pipe.load_lora_weights` calls this.

        Args:
            adapter: its weights by name, or a directory that PEFT wrote.
            prefix: what the names of the transformer's weights begin with.
            options: `adapter_name`, `network_alphas`, `metadata` and the rest of diffusers' arguments.

        Raises:
            EngineError: the engine's weights cannot be changed; what to do.
            CheckpointError: the adapter is damaged, incomplete, or of another model, be it in part.
            SettingsError: the name is taken.
        """
        self.adapters.load(adapter, prefix, options)
        self.reset()

    def set_adapters(self, adapter_names: list[str] | str, weights: Any = None) -> None:
        """Make these adapters the active ones, at these scales (1 where None); see diffusers.

        Raises:
            SettingsError: no adapter of a name is loaded.
        """
        self.adapters.set_active([adapter_names] if isinstance(adapter_names, str) else list(adapter_names), weights)
        self.reset()

    def unload_lora(self) -> None:
        """Forget every adapter; the weights are the export's again, to the bit."""
        self._change("unload_lora")

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Forget some adapters."""
        self._change("delete_adapters", adapter_names)

    def disable_lora(self) -> None:
        """Compute without the adapters, until `enable_lora`."""
        self._change("disable_lora")

    def enable_lora(self) -> None:
        """Compute with the active adapters again."""
        self._change("enable_lora")

    set_adapter, disable_adapters, enable_adapters = set_adapters, disable_lora, enable_lora  # PEFT's names

    def fuse_lora(self, lora_scale: float = 1.0, **options: Any) -> None:
        """Fuse the adapters into the weights of the torch engine's module.

        Raises:
            SettingsError: another engine, where adapters always are in the weights.
        """
        if not isinstance(self.adapters.engine, TorchStepEngine):
            raise SettingsError(
                f"fuse_lora: adapters are always in the weights of the engine {self.adapters.engine.name}",
                "leave it out, give scales to set_adapters, or keep an adapter for good with cat-export --lora",
            )
        self._change("fuse_lora", lora_scale, **options)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`."""
        self._change("unfuse_lora")

    def active_adapters(self) -> list[str]:
        """The names of the adapters in use."""
        return self.adapters.active

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configurations of the adapters that are loaded, by name; absent where there are none, as in diffusers."""
        if not self.adapters.loaded:
            raise AttributeError("peft_config")
        return self.adapters.loaded

    @property
    def _hf_peft_config_loaded(self) -> bool:
        return bool(self.adapters.loaded)

    @property
    def _transformer_norm_layers(self) -> None:
        return None

    @_transformer_norm_layers.setter
    def _transformer_norm_layers(self, layers: Any) -> None:
        """FLUX's pipeline sets it, last of all, for an adapter that replaces norms; it would leave them out."""
        if layers is not None:
            self.unload_lora()
            raise SettingsError("the adapter replaces norms, which no engine takes; all adapters were unloaded")

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """Every module, the layers of PEFT that hold adapters among them: pipelines read off them what is active."""
        own = list(super().modules(remove_duplicate))  # type: ignore[misc]  # of nn.Module
        known = set(map(id, own))
        yield from own
        yield from (layer for layer in self.adapters.layers if id(layer) not in known)

    def save_lora_adapter(self, save_directory: str | Path, **options: Any) -> None:
        """Save an adapter that is loaded, as diffusers does.

        Raises:
            SettingsError: none is loaded, or none of the name.
        """
        name = options.get("adapter_name", "default")
        if name not in self.adapters.loaded:
            loaded = ", ".join(self.adapters.loaded) or "none"
            raise SettingsError(f"no adapter {name!r} is loaded; loaded: {loaded}", "give its adapter_name")
        self.adapters.module.save_lora_adapter(save_directory, **options)

    def _change(self, method: str, *arguments: Any, **options: Any) -> None:
        self.adapters.change(method, *arguments, **options)
        self.reset()
