"""A step engine computes one sampling step: full or pruned, it is told by the indices it gets.

    StepEngine     the weights, loaded once; shared by every thread
      OnnxRuntimeStepEngine   the exported graphs; the default where there is no GPU
      TensorRTStepEngine      the plans; the default where there are some for the GPU
      TorchStepEngine         the intercepted module; the reference
    StepSession    the memory of one image (or batch of images) in progress: see `cat_pruning.engines.session_pool`

A session allocates once per shape, and every step reads and writes the same memory: what can be bound is bound once,
and on a GPU a step, its selection included, is captured and replayed as one launch (`cat_pruning.engines.cuda_graphs`).

A maker implements `StepEngine.session` and `StepSession._allocate`, `_begin`, `_load` and `_run`; nothing else.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from cat_pruning.engines.cuda_graphs import CudaGraphs
from cat_pruning.engines.finite_check import FiniteCheck
from cat_pruning.engines.graph_weights import GraphWeights
from cat_pruning.engines.host_memory import give_back_freed_memory
from cat_pruning.engines.residual_inputs import ResidualInputs
from cat_pruning.errors import EngineError, ShapeError
from cat_pruning.families.family import Family
from cat_pruning.finite import has_values
from cat_pruning.step_io import LATENTS, TIMESTEP, StepDims

_FORMATS: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TokenChoice(Protocol):
    """Which tokens a pruned step computes, chosen within the step."""

    num_kept: int  # n

    def __call__(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The tokens, (B, n) int32, from the step's latents and the last noise prediction.

        It may be replayed instead of called: it has to work on memory that stays where it is, and not synchronise.
        """


class StepEngine(ABC):
    """The weights of one model, ready to compute steps.

    Attributes:
        name: how the tools call it: "onnxruntime", "tensorrt", "tensorrt_rtx", "torch".
        family: the model's family, bound to the transformer's config.
        device, dtype: of the inputs and outputs of a step; timesteps are fp32.
        cuda_graphs: whether sessions capture their steps; only on a GPU.
        takes_residuals: whether steps add a ControlNet's residuals.
        residual_inputs: those that every step reads, of a ControlNet or zeros.
    """

    name: str
    family: Family
    device: torch.device
    dtype: torch.dtype
    cuda_graphs: bool = False
    takes_residuals: bool = False
    residual_inputs: tuple[str, ...] = ()

    @abstractmethod
    def session(self) -> StepSession:
        """New memory over the same weights, for one image at a time."""

    def base_weights(self) -> GraphWeights:
        """The weights of the export, which `set_weights` changes.

        Raises:
            EngineError: this engine's weights cannot be changed; what to do.
        """
        raise EngineError(
            f"the engine {self.name} takes no other weights", "export with the adapter: cat-export --lora"
        )

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take these weights, and for all others those of the export. Waits for a GPU.

        An image in progress ends with the weights that it began with, or with an EngineError.

        Args:
            weights: by their initializers' names in the exported graphs, in their dtypes and shapes.

        Raises:
            EngineError: the engine refuses.
        """
        raise EngineError(f"the engine {self.name} takes no other weights")


class StepSession(ABC):
    """The memory of one image in progress. Not thread-safe.

    It is allocated once per shape and kept for the next image of that shape.
    """

    num_cache_sets = 1  # that steps take in turn

    def __init__(self, engine: StepEngine) -> None:
        self.engine = engine
        self._dims: StepDims | None = None  # of the image in progress
        self._steps = 0  # of the image in progress that were computed
        self._allocated: tuple[StepDims, torch.device, torch.dtype] | None = None  # what the memory is for
        self._inputs: dict[str, Tensor] = {}  # the model's inputs by name
        self._noise = torch.empty(0)  # the last output
        self._keep_indices: dict[int, Tensor] = {}  # (B, n) int32 by n
        self._last_kept: int | None = None  # n of the last step
        self._streams: tuple[Any, Any] | None = None  # of CUDA: that its memory was allocated on, and last used on
        self._graphs = CudaGraphs()
        self._residuals = ResidualInputs()
        self._finite = FiniteCheck()

    def reset(self) -> None:
        """Forget the image in progress; its memory is kept for the next one of its shape."""
        self._dims = None
        self._steps = 0
        self._finite.forget()

    def begin(self, dims: StepDims, conditioning: Mapping[str, Tensor], timesteps: Sequence[float] = ()) -> None:
        """Begin an image.

        Args:
            dims: its dimensions; `num_kept` is what pruned steps will compute, 0 if that is nothing or not known yet.
            conditioning: the model's inputs other than `hidden_states` and `timestep`, wherever they are and in
                whatever dtype; they hold for every step of the image, and are copied.
            timesteps: those that are expected, in order, so that what depends on them only can be computed at once. A
                step at another timestep is as right, and slower.

        Raises:
            ShapeError: the inputs do not fit each other, or the engine was not built for their shapes.
            EngineError: the engine failed, or its device has not enough memory.
        """
        self.reset()
        self._check(dims)
        _check_format(self.engine)
        dims = dataclasses.replace(dims, num_kept=0)
        engine = self.engine
        shapes = engine.family.input_shapes(dims)
        given = {name: conditioning[name] for name in shapes if name not in (LATENTS, TIMESTEP)}
        for name, tensor in given.items():
            if tuple(tensor.shape) != shapes[name]:
                raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, expected {shapes[name]}")
        needed = (dims, engine.device, engine.dtype)
        with ordinary_tensors(), self._memory_for(dims):
            self._come_to_stream()
            if needed != self._allocated:
                self._free()
                if engine.device.type == "cpu":
                    give_back_freed_memory()
                self._allocate_all(dims)
                self._allocated = needed
            for name, tensor in given.items():
                self._inputs[name].copy_(tensor)
            self._begin(dims, timesteps)
        if not has_values(engine.device):  # not before: hooks that took the weights away are told as such
            raise EngineError(
                "the transformer's weights are on the meta device, which has no values", "load them again"
            )
        self._dims = dims

    def step(
        self,
        latents: Tensor,
        timestep: float,
        tokens: Tensor | TokenChoice,
        residuals: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Compute some tokens; the others keep their last output (algorithm 1). Of no tokens, nothing is computed.

        Args:
            latents: the model's `hidden_states`, on the engine's device and in its dtype.
            timestep: the same for every row of the batch.
            tokens: (B, n) int32, distinct within a row, or the choice of them; all N on the first step after `begin`.
                Where all N are given, they ascend.
            residuals: a ControlNet's, of all tokens, wherever they are: see `Family.residuals`. They are copied.

        Returns:
            The noise prediction before guidance, in the layout of the transformer's output; new memory. Does not
            synchronise with a GPU, but when a step of its kind is captured, once per shape.

        Raises:
            ShapeError: the latents do not fit the image that was begun, or the engine was not built for n tokens.
            EngineError: no image was begun, a pruned step before any full one, the engine failed, its device has not
                enough memory, or the image's first output was not finite: on a GPU a few steps later.
        """
        dims = self._dims
        if dims is None:
            raise EngineError("a step before an image was begun", "call begin first")
        if latents.shape != (expected := self._inputs[LATENTS].shape):
            raise ShapeError(f"{LATENTS} has shape {tuple(latents.shape)}, expected {tuple(expected)}")
        num_kept = tokens.shape[1] if isinstance(tokens, Tensor) else tokens.num_kept
        if self._steps == 0 and num_kept != dims.num_tokens:
            raise EngineError(
                f"the first step of an image must compute all {dims.num_tokens} tokens, but was given {num_kept}: "
                "nothing is cached yet",
                "run a full step first",
            )
        try:
            with ordinary_tensors(), self._memory_for(dims):
                self._come_to_stream()
                self._finite.poll()
                if num_kept:
                    self._inputs[LATENTS].copy_(latents)
                    self._residuals.take(residuals, self._inputs, self.engine.residual_inputs, self._residual_buffer)
                    self._load(timestep)
                    self._compute(tokens, num_kept)
                    self._steps += 1
                    if self._steps == 1:
                        self._finite.watch(self._noise)
                else:
                    self._last_kept = 0
                    self._keep_indices[0] = self._noise.new_empty((self._noise.shape[0], 0), dtype=torch.int32)
                return self._noise.clone()
        except BaseException:
            self.reset()  # the caches may be half updated
            raise

    def free(self) -> None:
        """Forget the image in progress and let go of all memory."""
        self.reset()
        self._free()

    def has_memory_for(self, dims: StepDims) -> bool:
        """Whether an image of these dimensions needs no new memory."""
        return self._allocated == (dataclasses.replace(dims, num_kept=0), self.engine.device, self.engine.dtype)

    @property
    def num_bytes(self) -> int:
        """The memory that it holds for images: inputs, outputs, caches."""
        storages = (tensor.untyped_storage() for tensor in _tensors_in(list(vars(self).values())))
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def computed(self) -> Tensor:
        """A copy of the tokens that the last step computed, (B, n) int32."""
        assert self._last_kept is not None
        return self._keep_indices[self._last_kept].clone()

    def to_engine(self, name: str, tensor: Tensor) -> Tensor:
        """An input of the model on the engine's device and in the dtype that it has there."""
        engine = self.engine
        return tensor.to(engine.device, engine.family.input_dtype(name, engine.dtype))

    def _compute(self, tokens: Tensor | TokenChoice, num_kept: int) -> None:
        """Choose and compute the tokens, on memory that stays where it is."""
        self._last_kept = num_kept
        keep_indices = self._keep_indices.get(num_kept)
        if keep_indices is None:
            shape = (self._noise.shape[0], num_kept)
            keep_indices = torch.empty(shape, dtype=torch.int32, device=self._noise.device)
            self._keep_indices[num_kept] = keep_indices
        if isinstance(tokens, Tensor):
            keep_indices.copy_(tokens)

        def body() -> None:
            if not isinstance(tokens, Tensor):
                keep_indices.copy_(tokens(self._inputs[LATENTS], self._noise))
            self._run(keep_indices)

        if self.engine.cuda_graphs:
            chosen_by = num_kept if isinstance(tokens, Tensor) else tokens
            key = (chosen_by, self._steps % self.num_cache_sets, self._residuals.places)
            self._graphs.run(key, body, self._noise.device)
        else:
            body()

    def _come_to_stream(self) -> None:
        """Wait for what another thread launched, if that was on another stream; nothing else orders the two."""
        if self.engine.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.engine.device)
        if self._streams is None:
            self._streams = stream, stream
        elif self._streams[1] != stream:
            self._streams[1].synchronize()
            self._streams = self._streams[0], stream

    def _allocate_all(self, dims: StepDims) -> None:
        engine = self.engine
        family, device = engine.family, engine.device
        self._streams = None
        self._come_to_stream()
        try:
            self._noise = zeros(family.noise_shape(dims), engine.dtype, device)
            self._inputs = {
                name: zeros(shape, family.input_dtype(name, engine.dtype), device)
                for name, shape in family.input_shapes(dims).items()
            }
            self._allocate(dims)
        except BaseException:
            self._free()
            raise

    def _residual_buffer(self) -> Tensor:
        assert self._dims is not None
        engine, dims = self.engine, self._dims
        width = engine.family.caches()[0].width
        return zeros((dims.batch, dims.num_tokens, width), engine.dtype, engine.device)

    @contextmanager
    def _memory_for(self, dims: StepDims) -> Iterator[None]:
        """Let go of everything if the device is full: what is cached for nothing may be what the next image needs."""
        what = f"an image of {dims.latent_height}x{dims.latent_width} latents and {dims.batch} rows"
        try:
            with enough_memory(self.engine.device, what, "generate smaller or fewer images at once"):
                yield
        except EngineError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                self.reset()
                self._free()
            raise

    def _free(self) -> None:
        """Let go of the memory, so that it is not held while other memory is allocated.

        Torch gives it to the next who asks on the stream that it was allocated on, and knows of no other stream's use.
        """
        if self._streams is not None and self._streams[0] != self._streams[1]:
            self._streams[1].synchronize()
        self._allocated = None
        self._graphs.clear()
        self._residuals = ResidualInputs()
        self._inputs, self._keep_indices, self._noise = {}, {}, torch.empty(0)

    def _check(self, dims: StepDims) -> None:  # noqa: B027  # most engines take any shape
        """Raise ShapeError for shapes that the engine was not built for, before any memory is let go of."""

    @abstractmethod
    def _allocate(self, dims: StepDims) -> None:
        """Allocate the caches for `dims`, and whatever else steps use."""

    @abstractmethod
    def _begin(self, dims: StepDims, timesteps: Sequence[float]) -> None:
        """Prepare for the steps of one image, whose conditioning is in `_inputs`."""

    @abstractmethod
    def _load(self, timestep: float) -> None:
        """Prepare for one step; not replayed."""

    @abstractmethod
    def _run(self, keep_indices: Tensor) -> None:
        """Run one step: from `_inputs`, `_noise` and the caches to `_noise` and the caches. May be replayed."""


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """No gradients, and no inference mode either: what is allocated under that could not be written outside it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def enough_memory(device: torch.device, what: str, remedy: str) -> Iterator[None]:
    """A device that is out of memory as an EngineError: on which, for what, and what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise EngineError(f"{device} has not enough memory for {what}: {reason}", remedy) from error


def _check_format(engine: StepEngine) -> None:
    """That a model which was cast still has weights to compute with."""
    if engine.dtype not in _FORMATS:
        raise EngineError(
            f"the transformer's weights are of {engine.dtype}, which no layer computes in",
            "move it to torch.bfloat16, or let diffusers cast: transformer.enable_layerwise_casting(…)",
        )


def _tensors_in(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors_in(list(value.values()))
        elif isinstance(value, list):
            yield from _tensors_in(value)


def zeros(shape: Sequence[int | str], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of a shape whose dimensions are all known."""
    return torch.zeros([int(dim) for dim in shape], dtype=dtype, device=device)
