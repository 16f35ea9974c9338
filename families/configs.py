"""What a transformer's config must be, for each family: types, signs, sizes, and what follows from what.

A config comes from a checkpoint's config.json or a bundle's manifest, which anybody may have edited. It is validated
where it is read, so that what is wrong is told by name and not by a layer, an engine or a machine without memory. The
bounds are far beyond every published model. What a family does not read is left to diffusers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Final, Self

import pydantic
from pydantic import BaseModel, Field, Strict, model_validator

from cat_pruning.errors import CheckpointError

Width = Annotated[int, Field(ge=1, le=1 << 16)]
Side = Annotated[int, Field(ge=1, le=1 << 10)]  # of a position table or an image, whose tokens are its square
Layers = Annotated[int, Field(ge=0, le=256)]
Heads = Annotated[int, Field(ge=1, le=1024)]

_MOST_FAULTS: Final = 3


class ModelConfig(BaseModel):
    """The base of all, and all there is to say of a family that has none."""

    model_config = pydantic.ConfigDict(frozen=True, extra="ignore", strict=True)


class _AttentionConfig(ModelConfig):
    num_layers: Layers
    num_attention_heads: Heads
    attention_head_dim: Heads

    @property
    def width(self) -> int:
        """Of a token within the model."""
        return self.num_attention_heads * self.attention_head_dim

    def _equal(self, name: str, expected: int, why: str) -> None:
        if (value := getattr(self, name)) != expected:
            raise ValueError(f"{name} is {value}, {why} make it {expected}")


class _PatchConfig(_AttentionConfig):
    num_layers: Annotated[int, Field(ge=1, le=256)]
    sample_size: Side
    patch_size: Side
    in_channels: Width
    out_channels: Width


class SD3Config(_PatchConfig):
    """SD3Transformer2DModel's."""

    joint_attention_dim: Width
    caption_projection_dim: Width
    pooled_projection_dim: Width
    pos_embed_max_size: Side
    dual_attention_layers: Annotated[tuple[Layers, ...], Strict(False)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._equal("caption_projection_dim", self.width, "num_attention_heads and attention_head_dim")
        if outside := [layer for layer in self.dual_attention_layers if layer >= self.num_layers]:
            raise ValueError(f"dual_attention_layers has {outside}, num_layers is {self.num_layers}")
        if self.sample_size > self.pos_embed_max_size * self.patch_size:
            raise ValueError(
                f"sample_size is {self.sample_size}, pos_embed_max_size and patch_size allow "
                f"{self.pos_embed_max_size * self.patch_size}"
            )
        return self


class PixArtConfig(_PatchConfig):
    """PixArtTransformer2DModel's."""

    cross_attention_dim: Width
    caption_channels: Width
    interpolation_scale: Annotated[float, Strict(False), Field(gt=0, le=1024)] | None
    use_additional_conditions: bool | None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._equal("cross_attention_dim", self.width, "num_attention_heads and attention_head_dim")
        if self.out_channels < self.in_channels:
            raise ValueError(f"out_channels is {self.out_channels}, less than in_channels, {self.in_channels}")
        return self


class FluxConfig(_AttentionConfig):
    """FluxTransformer2DModel's."""

    num_single_layers: Layers
    in_channels: Annotated[int, Field(ge=4, le=1 << 16, multiple_of=4)]  # 2 x 2 latent pixels are a token
    out_channels: Width | None
    joint_attention_dim: Width
    pooled_projection_dim: Width
    guidance_embeds: bool
    axes_dims_rope: Annotated[tuple[Annotated[int, Field(ge=2, le=1024, multiple_of=2)], ...], Strict(False)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.axes_dims_rope) != 3 or sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope is {list(self.axes_dims_rope)}, expected 3 numbers whose sum is attention_head_dim, "
                f"{self.attention_head_dim}"
            )
        return self


def check_config(model: type[ModelConfig], transformer_class: str, config: Mapping[str, Any]) -> None:
    """Check a transformer's config, with nothing left out.

    Raises:
        CheckpointError: what is wrong with it, by name.
    """
    try:
        model.model_validate(dict(config))
    except pydantic.ValidationError as error:
        faults = (_told(fault) for fault in error.errors(include_url=False))
        text = "; ".join(itertools.islice(faults, _MOST_FAULTS))
        raise CheckpointError(f"the config is not a {transformer_class}'s: {text}") from error


def _told(fault: Any) -> str:
    """A fault of pydantic's as words; those of `model_validator`s are words already."""
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return str(message)
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return f"{name} is missing"
    return f"{name} is {str(fault['input'])[:40]} ({message})"
