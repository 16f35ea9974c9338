"""The parts of a pipeline beside its transformer as graphs: their names, and the names of their dimensions.

A text encoder is one graph. An autoencoder is two, because most pipelines decode only. Scaling and shifting latents,
sampling the posterior, tiles and slices stay where they are: in the pipeline and in diffusers' own class.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from cat_pruning.errors import ShapeError

TEXT_ENCODERS: Final = ("text_encoder", "text_encoder_2", "text_encoder_3")
AUTOENCODER: Final = "vae"
COMPONENT_PARTS: Final = (*TEXT_ENCODERS, AUTOENCODER)  # the parts that can be graphs, by diffusers' names

INPUT_IDS: Final = "input_ids"  # (batch, text_length), int32
ATTENTION_MASK: Final = "attention_mask"  # (batch, text_length), int32: 1 for a token that counts
LAST_HIDDEN_STATE: Final = "last_hidden_state"  # (batch, text_length, width)
HIDDEN_STATES: Final = "hidden_states"  # (layers + 1, batch, text_length, width)
POOLED: Final = "pooled"  # (batch, width)
LATENTS: Final = "latents"  # (batch, channels, latent_height, latent_width), scaled back
IMAGE: Final = "image"  # (batch, 3, height, width), in [-1, 1]
MOMENTS: Final = "moments"  # (batch, 2 channels, latent_height, latent_width): mean and log-variance

DIMENSIONS: Final = ("batch", "text_length", "latent_height", "latent_width", "height", "width")
# Every tensor's dimensions by name; None for one that is a number, which is the model's.
SHAPES: Final[Mapping[str, tuple[str | None, ...]]] = {
    INPUT_IDS: ("batch", "text_length"),
    ATTENTION_MASK: ("batch", "text_length"),
    LAST_HIDDEN_STATE: ("batch", "text_length", None),
    HIDDEN_STATES: (None, "batch", "text_length", None),
    POOLED: ("batch", None),
    LATENTS: ("batch", None, "latent_height", "latent_width"),
    IMAGE: ("batch", None, "height", "width"),
    MOMENTS: ("batch", None, "latent_height", "latent_width"),
}


class Component(StrEnum):
    """The graphs of a pipeline's parts beside its transformer; each is `{component}.onnx`."""

    TEXT_ENCODER = "text_encoder"
    TEXT_ENCODER_2 = "text_encoder_2"
    TEXT_ENCODER_3 = "text_encoder_3"
    VAE_DECODER = "vae_decoder"
    VAE_ENCODER = "vae_encoder"

    @property
    def onnx(self) -> str:
        """The file's name in a bundle."""
        return f"{self.value}.onnx"

    @property
    def pipeline_part(self) -> str:
        """The part of the pipeline that it computes, or half of it."""
        return AUTOENCODER if self in (Component.VAE_DECODER, Component.VAE_ENCODER) else self.value

    @property
    def signatures(self) -> tuple[tuple[frozenset[str], frozenset[str]], ...]:
        """The names of inputs and of outputs that its graph may have: of a text encoder, CLIP's or T5's."""
        if self is Component.VAE_DECODER:
            return ((frozenset({LATENTS}), frozenset({IMAGE})),)
        if self is Component.VAE_ENCODER:
            return ((frozenset({IMAGE}), frozenset({MOMENTS})),)
        return (
            (frozenset({INPUT_IDS}), frozenset({LAST_HIDDEN_STATE, HIDDEN_STATES, POOLED})),
            (frozenset({INPUT_IDS, ATTENTION_MASK}), frozenset({LAST_HIDDEN_STATE})),
        )


def components_of(part: str) -> tuple[Component, ...]:
    """The graphs of one of `COMPONENT_PARTS`."""
    return tuple(component for component in Component if component.pipeline_part == part)


def with_both_sizes(sizes: Mapping[str, int], pixels_per_latent: int) -> dict[str, int]:
    """`sizes` by names of dimensions, with the pixels that latents decode to, or the latents of an image.

    Args:
        sizes: what is known.
        pixels_per_latent: the autoencoder's factor.

    Raises:
        ShapeError: an image is smaller than a latent.
    """
    found = dict(sizes)
    for side in ("height", "width"):
        latent = f"latent_{side}"
        if latent in found:
            found.setdefault(side, found[latent] * pixels_per_latent)
        elif side in found:
            found[latent] = found[side] // pixels_per_latent
            if not found[latent]:
                raise ShapeError(
                    f"an image has a {side} of {found[side]} pixels, expected {pixels_per_latent} at least"
                )
    return found
