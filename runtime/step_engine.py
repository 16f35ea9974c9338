"""A step engine computes one sampling step: full or pruned, it is told by the indices it gets.

    StepEngine     the weights, loaded once; shared by every thread
      OnnxRuntimeStepEngine   the exported graphs; the default where there is no GPU
      TorchStepEngine         the intercepted module; the reference
      (TensorRTStepEngine     a plan; has its place here)
    StepSession    the caches of one image (or batch of images) in progress; one per thread

A maker implements `StepEngine.session` and `StepSession._allocate`, `_begin` and `_run`; nothing else.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cat_pruning.errors import EngineError, ShapeError
from cat_pruning.exporter.families.family import Family
from cat_pruning.step_io import LATENTS, TIMESTEP, StepDims


class StepEngine(ABC):
    """The weights of one model, ready to compute steps.

    Attributes:
        name: how the tools call it: "onnxruntime", "torch".
        family: the model's family.
        config: the transformer's config, by diffusers' names.
        device, dtype: of the inputs and outputs of a step; timesteps are fp32.
    """

    name: str
    family: Family
    config: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def session(self) -> StepSession:
        """New caches over the same weights, for one thread."""


class StepSession(ABC):
    """The caches of one image in progress. Not thread-safe.

    The caches are allocated once per shape and updated in place.
    """

    def __init__(self, engine: StepEngine) -> None:
        self.engine = engine
        self._dims: StepDims | None = None  # of the image in progress
        self._allocated: tuple[StepDims, torch.device, torch.dtype] | None = None  # what the caches are for
        self._noise: Tensor | None = None  # the last output

    def reset(self) -> None:
        """Forget the image in progress; the memory of its caches is kept for the next one of its shape."""
        self._dims = None
        self._noise = None

    def begin(self, dims: StepDims, conditioning: Mapping[str, Tensor], timesteps: Sequence[float] = ()) -> None:
        """Begin an image.

        Args:
            dims: its dimensions; `num_kept` is not read.
            conditioning: the model's inputs other than `hidden_states` and `timestep`, wherever they are and in
                whatever dtype; they hold for every step of the image.
            timesteps: those that are expected, in order, so that what depends on them only can be computed at once. A
                step at another timestep is as right, and slower.

        Raises:
            ShapeError: the inputs do not fit each other.
            EngineError: the engine failed.
        """
        self.reset()
        dims = dataclasses.replace(dims, num_kept=0)
        engine = self.engine
        inputs: dict[str, Tensor] = {}
        for name, expected in engine.family.input_shapes(engine.config, dims).items():
            if name in (LATENTS, TIMESTEP):
                continue
            if tuple(conditioning[name].shape) != expected:
                raise ShapeError(f"{name} has shape {tuple(conditioning[name].shape)}, expected {expected}")
            inputs[name] = self.to_engine(name, conditioning[name])
        needed = (dims, engine.device, engine.dtype)
        with torch.inference_mode(False):  # or tensors of an image made under it could not be written outside it
            if needed != self._allocated:
                self._allocated = None  # until the new ones are there: an allocation may fail
                self._allocate(dims)
                self._allocated = needed
            self._begin(dims, inputs, timesteps)
        self._dims = dims

    def step(self, latents: Tensor, timestep: float, keep_indices: Tensor) -> Tensor:
        """Compute the kept tokens; the others keep their last output (algorithm 1).

        Args:
            latents: the model's `hidden_states`, on the engine's device and in its dtype.
            timestep: the same for every row of the batch.
            keep_indices: (B, n) int32, distinct within a row; all N tokens on the first step after `begin`.

        Returns:
            The noise prediction before guidance, in the layout of the transformer's output. The session reads it again
            on its next step: do not change it in place. Does not synchronise with a GPU.

        Raises:
            ShapeError: the latents do not fit the image that was begun.
            EngineError: no image was begun, a pruned step before any full one, or the engine failed.
        """
        dims, family, config = self._dims, self.engine.family, self.engine.config
        if dims is None:
            raise EngineError("a step before an image was begun; call begin first")
        if tuple(latents.shape) != (expected := family.input_shapes(config, dims)[LATENTS]):
            raise ShapeError(f"{LATENTS} has shape {tuple(latents.shape)}, expected {expected}")
        if self._noise is None:
            if (num_kept := keep_indices.shape[1]) != dims.num_tokens:
                raise EngineError(
                    f"the first step of an image must compute all {dims.num_tokens} tokens, but was given {num_kept}: "
                    "nothing is cached yet; run a full step first"
                )
            shape = [int(dim) for dim in family.noise_shape(config, dims)]
            self._noise = torch.zeros(shape, dtype=self.engine.dtype, device=self.engine.device)
        try:
            self._noise = self._run(latents, timestep, keep_indices, self._noise)
        except BaseException:
            self.reset()  # the caches may be half updated
            raise
        return self._noise

    def to_engine(self, name: str, tensor: Tensor) -> Tensor:
        """An input of the model on the engine's device and in the dtype that it has there."""
        engine = self.engine
        return tensor.to(engine.device, engine.family.input_dtype(name, engine.dtype))

    @abstractmethod
    def _allocate(self, dims: StepDims) -> None:
        """Allocate the caches for `dims`."""

    @abstractmethod
    def _begin(self, dims: StepDims, conditioning: dict[str, Tensor], timesteps: Sequence[float]) -> None:
        """Prepare for the steps of one image."""

    @abstractmethod
    def _run(self, latents: Tensor, timestep: float, keep_indices: Tensor, noise: Tensor) -> Tensor:
        """Run one step on the allocated caches; return new noise, leave `noise` as it is."""
