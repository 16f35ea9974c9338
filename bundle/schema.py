"""What a manifest is made of: every part frozen, strict, and refusing unknown fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import pydantic
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Strict,
    model_validator,
)

from cat_pruning.components import DIMENSIONS, SHAPES, TEXT_ENCODERS, Component
from cat_pruning.errors import ShapeError
from cat_pruning.names import Flavour
from cat_pruning.step_io import Part, Shape, StepDims

AttentionKernels = Literal["fused", "decomposable"]  # one kernel and no score matrix, or whatever the builder takes
TokenOps = Literal["plugin", "function"]  # the token operators of a plan: our kernels, or TensorRT's from their bodies


def _inside(path: str) -> str:
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path!r} is not a path inside the bundle: expected relative, with '/', without '..'")
    return path


def _dimension(name: str) -> str:
    if name not in (known := [field.name for field in dataclasses.fields(StepDims)]):
        raise ValueError(f"{name!r} is no dimension; known are {', '.join(known)}")
    return name


def _component_dimension(name: str) -> str:
    if name not in DIMENSIONS:
        raise ValueError(f"{name!r} is no dimension; known are {', '.join(DIMENSIONS)}")
    return name


def _graph(name: object) -> object:
    """The graph that a plan is of, by its name in JSON."""
    known = [*map(str, Part), *map(str, Component)]
    if name not in known:
        raise ValueError(f"{name!r} is no graph; known are {', '.join(known)}")
    return Part(name) if name in [*Part] else Component(str(name))


BundlePath = Annotated[str, AfterValidator(_inside)]
Architecture = Annotated[str, Field(pattern=r"^sm\d{2,3}$")]  # sm90: compute capability 9.0
_DimName = Annotated[str, AfterValidator(_dimension)]
_ComponentType = Annotated[str, Field(pattern="^(FLOAT|FLOAT16|BFLOAT16|INT32)$")]  # by ONNX's names
_ComponentDimName = Annotated[str, AfterValidator(_component_dimension)]


class Spec(BaseModel):
    """The base of all."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class LoraSpec(Spec):
    """An adapter that was fused into the weights, and the factor of its change."""

    path: str
    scale: float


class Source(Spec):
    """Where the weights came from; `seed` belongs to random ones, `revision` to the hub's.

    `in_memory` weights were a module's that a program passed; what `kind` says is where the rest came from.
    """

    kind: Literal["directory", "hub", "packaged", "random"]
    location: str
    revision: str | None = None
    seed: int | None = None
    loras: Annotated[tuple[LoraSpec, ...], Strict(False)] = ()
    in_memory: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "random" and self.seed is None:
            raise ValueError("random weights need a seed, or nobody can make them again")
        return self


class Geometry(Spec):
    """How pixels become tokens. `max_latent_size` is the side of the position table, None where there is none."""

    pixels_per_latent: PositiveInt
    patch_size: PositiveInt
    latent_channels: PositiveInt
    max_latent_size: PositiveInt | None
    text_length: PositiveInt


class ProfileSpec(Spec):
    """One set of shapes that the engine runs at; `height` and `width` in pixels, `batch` in rows."""

    name: Annotated[str, Field(min_length=1)]
    height: PositiveInt
    width: PositiveInt
    prompts: PositiveInt
    batch: PositiveInt
    latent_height: PositiveInt
    latent_width: PositiveInt
    num_tokens: PositiveInt
    num_kept: NonNegativeInt
    text_length: PositiveInt

    @property
    def resolution(self) -> str:
        """HEIGHTxWIDTH in pixels, as on the command line."""
        return f"{self.height}x{self.width}"


class TensorSpec(Spec):
    """An input or output of a graph: its ONNX type, and its shape with the dynamic dimensions by name."""

    name: Annotated[str, Field(min_length=1)]
    dtype: str
    shape: Annotated[tuple[PositiveInt | _DimName, ...], Strict(False)]

    def shape_at(self, dims: StepDims) -> Shape:
        """The shape with numbers for names."""
        return dims.named(self.shape)


class GraphSpec(Spec):
    """One ONNX graph of the bundle. The outputs of the prompt's and the timestep's are inputs of the step's.

    The dimension `batch` of the timestep's graph counts the rows of all the steps that it computes at once.
    """

    part: Annotated[Part, Strict(False)]
    file: BundlePath
    inputs: Annotated[tuple[TensorSpec, ...], Strict(False)]
    outputs: Annotated[tuple[TensorSpec, ...], Strict(False)]

    def input_shapes(self, dims: StepDims) -> dict[str, Shape]:
        """Every input's shape, by name and in graph order."""
        return {tensor.name: tensor.shape_at(dims) for tensor in self.inputs}


class ComponentTensor(Spec):
    """An input or output of a component's graph: its ONNX type, and its shape with the dynamic dimensions by name."""

    name: Annotated[str, Field(min_length=1)]
    dtype: _ComponentType
    shape: Annotated[tuple[PositiveInt | _ComponentDimName, ...], Strict(False)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        expected = SHAPES.get(self.name)
        if expected is None:
            raise ValueError(f"no graph of a component has a {self.name!r}; known are {', '.join(SHAPES)}")
        if tuple(dim if isinstance(dim, str) else None for dim in self.shape) != expected:
            raise ValueError(f"{self.name} has the shape {self.shape}, expected {expected} with numbers for None")
        return self

    def shape_at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with numbers for names."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)


class ComponentSpec(Spec):
    """The ONNX graph of one of the pipeline's other parts, whose weights are nowhere else in the bundle.

    text_lengths: of a text encoder: the shortest, the usual and the longest text that its plans are built for.
    """

    component: Annotated[Component, Strict(False)]
    file: BundlePath
    inputs: Annotated[tuple[ComponentTensor, ...], Strict(False), Field(min_length=1)]
    outputs: Annotated[tuple[ComponentTensor, ...], Strict(False), Field(min_length=1)]
    text_lengths: Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Strict(False)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.file != self.component.onnx:
            raise ValueError(f"{self.component} is the file {self.file}, expected {self.component.onnx}")
        inputs, outputs = ([tensor.name for tensor in tensors] for tensors in (self.inputs, self.outputs))
        if len({*inputs}) < len(inputs) or (frozenset(inputs), frozenset(outputs)) not in self.component.signatures:
            raise ValueError(f"{self.component} takes {', '.join(inputs)} and returns {', '.join(outputs)}")
        is_text, lengths = self.component.value in TEXT_ENCODERS, self.text_lengths
        if is_text is (lengths is None) or list(lengths or ()) != sorted(lengths or ()):
            expected = "three, none less than the one before" if is_text else "none"
            raise ValueError(f"{self.component} has the text lengths {lengths}, expected {expected}")
        return self

    def sizes_of(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The dynamic dimensions of inputs by their names.

        Raises:
            ShapeError: an input is missing or empty, or its dimensions are not as many or do not fit the others.
        """
        sizes: dict[str, int] = {}
        for tensor in self.inputs:
            shape = tuple(shapes.get(tensor.name, ()))
            fits = len(shape) == len(tensor.shape) and 0 not in shape
            for dim, size in zip(tensor.shape, shape, strict=False):
                fits = fits and (sizes.setdefault(dim, size) if isinstance(dim, str) else dim) == size
            if not fits:
                expected = f"({', '.join(map(str, tensor.shape))})" + (" and nothing empty" if 0 in shape else "")
                raise ShapeError(f"{self.file}: {tensor.name} has shape {shape}, expected {expected}")
        return sizes


class MacsSpec(Spec):
    """Multiply-accumulates at a profile: linear and convolution layers, and apart from them QKᵀ and PV.

    full, pruned: of one step. prompt: of what is computed once per image. timestep: of what is computed once for every
    step of a schedule. A model that is not split computes the last two on every step.
    """

    profile: str
    full_linear: NonNegativeInt
    full_attention: NonNegativeInt
    pruned_linear: NonNegativeInt
    pruned_attention: NonNegativeInt
    prompt_linear: NonNegativeInt
    timestep_linear: NonNegativeInt

    @property
    def full_total(self) -> int:
        """A full step, attention included."""
        return self.full_linear + self.full_attention

    @property
    def pruned_total(self) -> int:
        """A pruned step, attention included."""
        return self.pruned_linear + self.pruned_attention


class PlanSpec(Spec):
    """A built engine of one graph: the builder and its version, and the GPU architectures that it was built for.

    token_ops: what computes them, as the network had it when it was built. plugin_layers: how many plugin layers the
    engine's inspector counted after the build; None where there is no GPU to load it on. attention, fused_attention,
    scratch_bytes, score_bytes: see `plan_builder.PlanReport`. refittable: whether it takes other weights without being
    built again.
    """

    part: Annotated[Part | Component, BeforeValidator(_graph)]
    flavour: Flavour
    version: str
    architectures: Annotated[tuple[Architecture, ...], Strict(False), Field(min_length=1)]
    token_ops: TokenOps
    plugin_layers: NonNegativeInt | None = None
    attention: AttentionKernels | None = None
    fused_attention: NonNegativeInt | None = None
    scratch_bytes: NonNegativeInt | None = None
    score_bytes: NonNegativeInt | None = None
    refittable: bool = False
    file: BundlePath

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.flavour == "tensorrt_rtx" and self.token_ops == "plugin":
            raise ValueError("TensorRT-RTX has no plugins; expected token_ops 'function'")
        return self


class PipelineSpec(Spec):
    """The pipeline's other parts: copied below `path`, or on the hub under `hub_id` at `revision`.

    variant: of the copied weights, where a part has no plain ones; as diffusers' `from_pretrained` takes it.
    """

    kind: Literal["copied", "hub"]
    path: BundlePath | None = None
    hub_id: str | None = None
    revision: str | None = None
    variant: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        needed = "path" if self.kind == "copied" else "hub_id"
        if getattr(self, needed) is None:
            raise ValueError(f"a pipeline of kind {self.kind!r} needs {needed}")
        return self


class FileSpec(Spec):
    """What a file of the bundle must be; `sha256` in lower-case hexadecimal."""

    size: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
