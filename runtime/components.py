"""Text encoders and an autoencoder whose graphs an engine computes, in the places of a diffusers pipeline's own.

The pipeline stays as it is: it encodes prompts, scales latents, tiles and slices as always. An autoencoder is
diffusers' own `AutoencoderKL` with engines for its encoder and decoder. A text encoder is a module with the config and
the outputs of transformers' own. Neither holds a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, Self

import torch
from torch import Tensor, nn

from cat_pruning.components import (
    ATTENTION_MASK,
    AUTOENCODER,
    HIDDEN_STATES,
    IMAGE,
    INPUT_IDS,
    LAST_HIDDEN_STATE,
    LATENTS,
    MOMENTS,
    POOLED,
    TEXT_ENCODERS,
    Component,
)
from cat_pruning.engines.component_engine import ComponentEngine
from cat_pruning.errors import SettingsError
from cat_pruning.imports import importing

_REMEDY: Final = "export the bundle without it (cat-export --components), or take --engine torch"
# What users call on a text encoder that has parameters.
_REFUSED: Final = (
    "add_adapter", "load_adapter", "get_input_embeddings", "set_input_embeddings", "resize_token_embeddings",
    "gradient_checkpointing_enable",
)  # fmt: skip
_NOT_SAVED: Final = ("save_pretrained", "push_to_hub")  # which would write a config without weights


class _EngineModule(nn.Module):
    """A module that an engine computes; it stays on its engine's device, in its dtype, wherever its pipeline goes.

    Its one parameter is empty: diffusers and accelerate read dtype and device off it.
    """

    def __init__(self, engine: ComponentEngine) -> None:
        super().__init__()
        self.engine = engine
        empty = torch.empty(0, dtype=engine.dtype, device=engine.device)
        self.register_parameter("_empty", nn.Parameter(empty, requires_grad=False))
        self.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half`, `cuda` and the like do: nothing."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The module itself: it keeps nothing from one call to the next."""
        return self


class EngineTextEncoder(_EngineModule):
    """A CLIP or T5 text encoder in the place of transformers' own.

    Args:
        engine: of its graph.
        config: of transformers, of the class of the original.
        output: makes transformers' output of the results by name, None for what the graph has not got.
    """

    def __init__(self, engine: ComponentEngine, config: Any, output: Callable[[Mapping[str, Any]], Any]) -> None:
        super().__init__(engine)
        self.config, self._output = config, output
        self._takes_mask = any(tensor.name == ATTENTION_MASK for tensor in engine.spec.inputs)

    @property
    def dtype(self) -> torch.dtype:
        """Of the engine."""
        return self.engine.dtype

    @property
    def device(self) -> torch.device:
        """Of the engine."""
        return self.engine.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Encode prompts. Does not synchronise with a GPU.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length), of T5; None for a mask of ones.
            output_hidden_states: as transformers takes it; of CLIP only.
            return_dict: likewise.
            others: refused, unless they are None or False.

        Raises:
            SettingsError: an argument that the graph does not take.
            ShapeError, BundleError, EngineError: as `ComponentEngine.run`.
        """
        given = {name: value for name, value in others.items() if value is not None and value is not False}
        if attention_mask is not None and not self._takes_mask:
            given["attention_mask"] = attention_mask
        if given:
            raise SettingsError(f"{self._name} is a graph and takes no {', '.join(given)}", _REMEDY)
        inputs = {INPUT_IDS: input_ids}
        if self._takes_mask:
            inputs[ATTENTION_MASK] = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        results: dict[str, Any] = dict(self.engine.run(inputs))
        states = results.pop(HIDDEN_STATES, None)
        if output_hidden_states and states is None:
            raise SettingsError(f"{self._name} is a graph without hidden states of its layers", _REMEDY)
        results[HIDDEN_STATES] = tuple(states.unbind(0)) if output_hidden_states else None
        output = self._output(results)
        return output if return_dict else output.to_tuple()

    @property
    def _name(self) -> str:
        return self.engine.spec.component.value

    def __getattr__(self, name: str) -> Any:
        if name in (*_REFUSED, *_NOT_SAVED):
            return _refusal(self._name, name)
        if name == "text_model":  # what diffusers looks for first, where an adapter has weights for a text encoder
            _refusal(self._name, name)()
        return super().__getattr__(name)


class EngineDecoder(_EngineModule):
    """The decoder of an autoencoder, with the convolution before it."""

    def forward(self, sample: Tensor, latent_embeds: None = None) -> Tensor:
        """The image (batch, 3, height, width) of latents (batch, channels, height / f, width / f)."""
        return self.engine.run({LATENTS: sample})[IMAGE]


class EngineEncoder(_EngineModule):
    """The encoder of an autoencoder, with the convolution after it."""

    def forward(self, sample: Tensor) -> Tensor:
        """The moments (batch, 2 channels, height / f, width / f) of an image (batch, 3, height, width)."""
        return self.engine.run({IMAGE: sample})[MOMENTS]


def engine_autoencoder(folder: Path, decoder: ComponentEngine, encoder: ComponentEngine, pixels_per_latent: int) -> Any:
    """Diffusers' `AutoencoderKL` of a config, whose encoder and decoder are engines.

    Args:
        folder: with its config.json.
        decoder: the engine of its decoder.
        encoder: the engine of its encoder.
        pixels_per_latent: of both.

    Raises:
        ValueError: the config is of another autoencoder.
        OSError: there is none.
    """
    with importing:
        from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    if (factor := 2 ** (len(vae.config.block_out_channels) - 1)) != pixels_per_latent:
        raise ValueError(f"{factor} pixels are a latent, in the graphs {pixels_per_latent}")
    vae.decoder, vae.encoder = EngineDecoder(decoder), EngineEncoder(encoder)
    vae.quant_conv, vae.post_quant_conv = nn.Identity(), nn.Identity()  # the graphs have them; tiles ask the config
    for name in _NOT_SAVED:
        setattr(vae, name, _refusal(AUTOENCODER, name))
    return vae.eval()


def _refusal(part: str, name: str) -> Callable[..., NoReturn]:
    """A method that a part whose weights are in a graph has not got."""

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise SettingsError(f"{part} is a graph, which has no {name}", _REMEDY)

    return refuse


def engine_text_encoder(folder: Path, name: str, engine: ComponentEngine) -> EngineTextEncoder:
    """A text encoder of transformers' class `name`.

    Args:
        folder: with its config.json.
        name: CLIPTextModel, CLIPTextModelWithProjection or T5EncoderModel.
        engine: of its graph.

    Raises:
        KeyError, ValueError: it is of another class, or its graph is.
        OSError: there is no such config.
    """
    with importing:
        import transformers
        from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

    outputs: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "CLIPTextModel": lambda results: BaseModelOutputWithPooling(
            last_hidden_state=results[LAST_HIDDEN_STATE],
            pooler_output=results[POOLED],
            hidden_states=results[HIDDEN_STATES],
        ),
        "CLIPTextModelWithProjection": lambda results: CLIPTextModelOutput(
            text_embeds=results[POOLED],
            last_hidden_state=results[LAST_HIDDEN_STATE],
            hidden_states=results[HIDDEN_STATES],
        ),
        "T5EncoderModel": lambda results: BaseModelOutput(last_hidden_state=results[LAST_HIDDEN_STATE]),
    }
    is_clip = any(tensor.name == POOLED for tensor in engine.spec.outputs)
    if is_clip is (name == "T5EncoderModel"):
        raise ValueError(f"{engine.spec.file} is not the graph of a {name}")
    config = getattr(transformers, name).config_class.from_pretrained(folder)
    return EngineTextEncoder(engine, config, outputs[name])


def engines_of(pipe: Any) -> dict[Component, ComponentEngine]:
    """The engines of a pipeline's parts beside its transformer; none of parts that are torch's."""
    encoders = (getattr(pipe, name, None) for name in TEXT_ENCODERS)
    vae = getattr(pipe, "vae", None)
    modules = [*encoders, getattr(vae, "decoder", None), getattr(vae, "encoder", None)]
    engines = [module.engine for module in modules if isinstance(module, _EngineModule)]
    return {engine.spec.component: engine for engine in engines}
