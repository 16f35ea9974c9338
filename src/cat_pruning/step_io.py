"""The inputs and outputs of one sampling step: their names, their order and their shapes.

One graph serves full and pruned steps; `keep_indices` says which tokens it computes.
Exporter, engine builds and step engines all read the names and shapes from here.

What a sampling loop would compute again and again from the same inputs is not in that graph but in two others
(`cat_pruning.exporter.split`), whose results it takes as inputs: see `Part`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

Dim = int | str  # a number, or the name of a dynamic dimension
Shape = tuple[Dim, ...]

KEEP_INDICES = "keep_indices"
NOISE = "noise"
LATENTS = "hidden_states"
TIMESTEP = "timestep"
RESIDUAL = "residual_"
MAX_TIMESTEPS = 64  # that timestep.onnx computes at once; it bounds the memory of the results


class Part(StrEnum):
    """The graphs of an export, by what their results depend on; each is `{part}.onnx`."""

    PROMPT = "prompt"  # on what is said of the image: run once per image
    TIMESTEP = "timestep"  # on the timestep and the pooled text: run once for all steps of a schedule
    STEP = "step"  # on the latents too: run on every step

    @property
    def onnx(self) -> str:
        """The file's name in a bundle."""
        return f"{self.value}.onnx"


class CacheRows(StrEnum):
    """Which rows the key and value caches of an attention hold."""

    JOINT = "joint"  # N image rows and T text rows, in the family's order
    IMAGE = "image"  # N image rows


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The key and value caches of one attention, each (B, S, width) with S = N + T or N."""

    rows: CacheRows
    width: int

    def shape(self, dims: StepDims) -> Shape:
        """(B, S, width)."""
        return (dims.batch, dims.joint_rows if self.rows is CacheRows.JOINT else dims.num_tokens, self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDims:
    """The dynamic dimensions of a step, as numbers or as the names they have in the ONNX file.

    batch: B, rows; with guidance 2 x prompts. latent_height, latent_width: of the latents, in latent pixels.
    num_tokens: N, image tokens, those of reference images among them. joint_rows: N + T. text_length: T.
    num_kept: n, the tokens that the step computes.
    """

    batch: Dim
    latent_height: Dim
    latent_width: Dim
    num_tokens: Dim
    joint_rows: Dim
    text_length: Dim
    num_kept: Dim

    @classmethod
    def of(
        cls,
        *,
        batch: int,
        latent_height: int,
        latent_width: int,
        patch_size: int,
        text_length: int,
        num_kept: int,
        num_references: int = 0,
    ) -> StepDims:
        """The dimensions of a step as numbers, with the derived ones filled in."""
        num_tokens = (latent_height // patch_size) * (latent_width // patch_size) + num_references
        return cls(
            batch=batch,
            latent_height=latent_height,
            latent_width=latent_width,
            num_tokens=num_tokens,
            joint_rows=num_tokens + text_length,
            text_length=text_length,
            num_kept=num_kept,
        )

    def named(self, shape: Shape) -> Shape:
        """`shape` with the names of dimensions replaced by their values here."""
        return tuple(getattr(self, dim) if isinstance(dim, str) else dim for dim in shape)


SYMBOLIC = StepDims(
    batch="batch",
    latent_height="latent_height",
    latent_width="latent_width",
    num_tokens="num_tokens",
    joint_rows="joint_rows",
    text_length="text_length",
    num_kept="num_kept",
)


def cache_names(num_caches: int) -> list[str]:
    """The caches' input names in graph order: key_cache_0, value_cache_0, key_cache_1, ..."""
    return [f"{part}_cache_{layer}" for layer in range(num_caches) for part in ("key", "value")]


def residual_names(num_residuals: int) -> list[str]:
    """The names of the inputs that a ControlNet's residuals are, by block: residual_0, residual_1, ..."""
    return [f"{RESIDUAL}{block}" for block in range(num_residuals)]


def is_residual(name: str) -> bool:
    """Whether an input of the step is a ControlNet's residual."""
    return name.startswith(RESIDUAL)


def is_changed_in_place(name: str) -> bool:
    """Whether an input of the step is one that a scatter writes into: the last noise, or a cache."""
    return name == NOISE or name.startswith(("key_cache_", "value_cache_"))


def output_name(name: str) -> str:
    """The output that updates the input `name`."""
    return f"{name}_out"


def output_names(num_caches: int) -> list[str]:
    """Every output in graph order: the noise, then the caches."""
    return [output_name(name) for name in (NOISE, *cache_names(num_caches))]


def input_shapes(
    dims: StepDims, noise: Shape, caches: Sequence[CacheSpec], model_inputs: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Every input's shape, by name and in graph order: keep_indices, noise, the caches, the transformer's own."""
    shapes: dict[str, Shape] = {KEEP_INDICES: (dims.batch, dims.num_kept), NOISE: noise}
    for name, spec in zip(cache_names(len(caches)), (spec for spec in caches for _ in range(2)), strict=True):
        shapes[name] = spec.shape(dims)
    return {**shapes, **model_inputs}
