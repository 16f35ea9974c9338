"""What users call on a diffusers model, on a transformer whose steps an engine computes.

Each of diffusers' public methods works, or is refused in one line that says what to use instead. Those that change a
module go to the torch engine's, which is the user's own; exported graphs have none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NoReturn, Self

import torch
from torch import nn

from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import SettingsError
from cat_pruning.families.attention import check_processor
from cat_pruning.runtime.adapters import empty_module

logger = logging.getLogger(__name__)

_LOAD: Final = "CatTransformer.from_bundle loads a bundle, from_model takes a diffusers transformer"
_SAVE: Final = "keep the bundle, or save the original transformer (`.engine.transformer`) in its pipeline"
_CONFIG: Final = "`config` is a dict of it"
_ATTENTION: Final = "leave it out: attention is torch's scaled_dot_product_attention, which has its own fast kernels"

# Refused on every engine, with what to do instead.
_REFUSED: Final[Mapping[str, str]] = {
    "enable_cache": "leave it out: `settings` say what is computed on which step",
    "compile": "CatTransformer.from_model(transformer, compiled=True)",
    "compile_repeated_blocks": "CatTransformer.from_model(transformer, compiled=True)",
    "enable_gradient_checkpointing": "train the original transformer",
    "enable_group_offload": 'give the pipeline exclude_modules=["transformer"], or take enable_model_cpu_offload',
    "enable_parallelism": "a process per GPU, each with its own pipeline",
    "enable_forward_chunking": "leave it out: a pruned step has few rows",
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "enable_npu_flash_attention": _ATTENTION,
    "enable_xla_flash_attention": _ATTENTION,
    "enable_lora_hotswap": "leave it out: adapters are loaded without compiling anew",
    "save_pretrained": _SAVE,
    "push_to_hub": _SAVE,
    "save_config": _CONFIG,
    "to_json_file": _CONFIG,
    "to_json_string": _CONFIG,
    "from_pretrained": _LOAD,
    "from_single_file": _LOAD,
    "from_config": _LOAD,
    "load_config": _CONFIG,
    "get_config_dict": _CONFIG,
    "extract_init_dict": _CONFIG,
    "register_for_auto_class": _LOAD,
    "_load_ip_adapter_weights": "use the original transformer for IP-adapters",
}

# Done by the torch engine's module, from the next image on; refused on exported graphs, with what to do instead.
_OF_THE_MODULE: Final[Mapping[str, str]] = {
    "fuse_qkv_projections": "leave it out",
    "unfuse_qkv_projections": "leave it out",
    "set_default_attn_processor": "leave it out",
    "enable_layerwise_casting": "export with a smaller --dtype",
    "dequantize": "export the checkpoint that was not quantised",
    "add_adapter": "load_lora_adapter loads one that is trained",
}


class ModelMethods:
    """The methods of diffusers' `ModelMixin`, `ConfigMixin`, `CacheMixin` and `AttentionMixin`."""

    engine: StepEngine
    config: Any
    is_cache_enabled = False  # diffusers' own caches
    has_compatibles, ignore_for_config = False, ()
    _warned_of_move = False

    def reset(self) -> None:
        """Forget this thread's image in progress."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        raise NotImplementedError

    def __copy__(self) -> Self:
        """As `copy.deepcopy`: an image of its own in progress, over the same weights."""
        return self.__deepcopy__({})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled."""
        raise SettingsError(
            "a CatTransformer cannot be pickled: engines do not leave their process",
            "load the pipeline in every process, from its bundle or its checkpoint",
        )

    @property
    def _module(self) -> Any:
        """The torch engine's own; None of graphs."""
        return self.engine.transformer if isinstance(self.engine, TorchStepEngine) else None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What `to`, `half`, `cuda` and the like do: it moves the torch engine's module, and no graphs."""
        before = (self.engine.device, self.engine.dtype)
        super()._apply(fn, recurse)  # type: ignore[misc]  # of nn.Module
        if self._module is not None:
            if (self.engine.device, self.engine.dtype) != before:
                self.reset()
            return self
        asked = fn(torch.empty(0, device=before[0], dtype=before[1]))
        if (asked.device, asked.dtype) != before and not self._warned_of_move:
            self._warned_of_move = True
            logger.warning(
                "the engine %s stays on %s in %s wherever its pipeline goes; cat-export --dtype makes another",
                self.engine.name,
                *before,
            )
        return self

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the torch engine's module; of graphs an empty one, off which device and dtype can be read."""
        if self._module is None:
            yield nn.Parameter(torch.empty(0, device=self.engine.device, dtype=self.engine.dtype), requires_grad=False)
        yield from super().parameters(recurse)  # type: ignore[misc]  # of nn.Module

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the transformer's weights are; under exported graphs none can be trained."""
        if self._module is None and only_trainable:
            return 0
        count: int = self._counted().num_parameters(only_trainable, exclude_embeddings)
        return count

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights, in the engine's dtype."""
        size: int = self._counted().to(self.engine.dtype).get_memory_footprint(return_buffers)
        return size

    def _counted(self) -> Any:
        """A module with the transformer's weights, be they without memory."""
        if self._module is not None:
            return self._module
        return empty_module(self.engine.family.transformer_class, self.engine.family.config)

    def register_to_config(self, **values: Any) -> None:
        """Change values of `config`, which pipelines read; the engine computes as before."""
        self.config = type(self.config)({**self.config, **values})

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Those of the torch engine's module by name; exported graphs have none."""
        return {} if self._module is None else self._module.attn_processors

    def set_attn_processor(self, processor: Any) -> None:
        """Set the attention processors of the torch engine's module; see diffusers.

        Raises:
            SettingsError: another engine, or a processor that is not the model's own.
        """
        module = self._module_for("set_attn_processor", "use the original transformer")
        for one in processor.values() if isinstance(processor, dict) else [processor]:
            check_processor(one)
        module.set_attn_processor(processor)
        self.reset()

    def set_attention_backend(self, backend: str) -> None:
        """Take "native", which is what every engine has.

        Raises:
            SettingsError: another backend.
        """
        if backend != "native":
            raise SettingsError(f"a CatTransformer has no attention backend {backend!r}", _ATTENTION)

    def reset_attention_backend(self) -> None:
        """Do nothing: the backend is "native"."""

    def disable_cache(self) -> None:
        """Do nothing: diffusers' caches are never enabled."""

    def disable_gradient_checkpointing(self) -> None:
        """Do nothing: it is never enabled."""

    def disable_forward_chunking(self) -> None:
        """Do nothing: it is never enabled."""

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Take False."""
        self._refuse_if("xFormers", valid)

    def set_use_npu_flash_attention(self, valid: bool) -> None:
        """Take False."""
        self._refuse_if("NPU flash attention", valid)

    def set_use_xla_flash_attention(self, use_xla_flash_attention: bool, *rest: Any, **options: Any) -> None:
        """Take False."""
        self._refuse_if("XLA flash attention", use_xla_flash_attention)

    def _refuse_if(self, what: str, wanted: bool) -> None:
        if wanted:
            raise SettingsError(f"a CatTransformer has no {what}", _ATTENTION)

    def _module_for(self, name: str, otherwise: str) -> Any:
        if self._module is None:
            raise SettingsError(f"{name}: the engine {self.engine.name} runs exported graphs, no module", otherwise)
        return self._module


def _refusal(name: str, instead: str) -> Any:
    def refuse(cls: type, *arguments: Any, **options: Any) -> NoReturn:
        raise SettingsError(f"a CatTransformer has no {name}", instead)

    refuse.__name__, refuse.__doc__ = name, f"Refused: {instead}."
    return classmethod(refuse)  # which an instance has too


def _of_the_module(name: str, otherwise: str) -> Any:
    def call(self: ModelMethods, *arguments: Any, **options: Any) -> Any:
        result = getattr(self._module_for(name, otherwise), name)(*arguments, **options)
        self.reset()
        return result

    call.__name__, call.__doc__ = name, f"diffusers' method, on the torch engine's module; on graphs: {otherwise}."
    return call


for _name, _instead in _REFUSED.items():
    setattr(ModelMethods, _name, _refusal(_name, _instead))
for _name, _instead in _OF_THE_MODULE.items():
    setattr(ModelMethods, _name, _of_the_module(_name, _instead))
