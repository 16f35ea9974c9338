"""A step engine computes one sampling step: full or pruned, it is told by the indices it gets.

    StepEngine     the weights, loaded once; shared by every thread
      OnnxRuntimeStepEngine   step.onnx; the default where there is no GPU
      TorchStepEngine         the intercepted module; the reference
      (TensorRTStepEngine     a plan; has its place here)
    StepSession    the caches of one image (or batch of images) in progress; one per thread

A maker implements `StepEngine.session` and `StepSession._allocate` and `_run`; nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cat_pruning.errors import EngineError, ShapeError
from cat_pruning.exporter.families.family import Family
from cat_pruning.step_io import StepDims


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
        self._allocated: tuple[StepDims, torch.device, torch.dtype] | None = None  # what the caches are for
        self._noise: Tensor | None = None  # (B, C, H, W), the last output

    def reset(self) -> None:
        """Forget the image in progress; the memory of its caches is kept for the next one of its shape."""
        self._noise = None

    def step(self, model_inputs: Mapping[str, Tensor], keep_indices: Tensor) -> Tensor:
        """Compute the kept tokens; the others keep their last output (algorithm 1).

        Args:
            model_inputs: the transformer's inputs by diffusers' names, on the engine's device and in its dtype.
            keep_indices: (B, n) int32, distinct within a row; all N tokens on the first step after `reset`.

        Returns:
            The noise prediction (B, C, H, W) before guidance. The session reads it again on its next step:
            do not change it in place. Does not synchronise with a GPU.

        Raises:
            ShapeError: the inputs do not fit each other.
            EngineError: a pruned step before any full one, or the engine failed.
        """
        dims = self._dims_of(model_inputs)
        num_kept = keep_indices.shape[1]
        needed = (dims, self.engine.device, self.engine.dtype)
        if needed != self._allocated:
            self.reset()
            self._allocated = None  # until the new ones are there: an allocation may fail
            with torch.inference_mode(False):  # or caches of an image made under it could not be written outside it
                self._allocate(dims)
            self._allocated = needed
        if self._noise is None:
            if num_kept != dims.num_tokens:
                raise EngineError(
                    f"the first step of an image must compute all {dims.num_tokens} tokens, but was given {num_kept}: "
                    "nothing is cached yet; run a full step first"
                )
            shape = (dims.batch, self.engine.config["out_channels"], dims.latent_height, dims.latent_width)
            self._noise = torch.zeros([int(dim) for dim in shape], dtype=self.engine.dtype, device=self.engine.device)
        try:
            self._noise = self._run(model_inputs, keep_indices, self._noise)
        except BaseException:
            self.reset()  # the caches may be half updated
            raise
        return self._noise

    @abstractmethod
    def _allocate(self, dims: StepDims) -> None:
        """Allocate the caches for `dims`."""

    @abstractmethod
    def _run(self, model_inputs: Mapping[str, Tensor], keep_indices: Tensor, noise: Tensor) -> Tensor:
        """Run one step on the allocated caches; return new noise, leave `noise` as it is."""

    def _dims_of(self, model_inputs: Mapping[str, Tensor]) -> StepDims:
        engine = self.engine
        batch, _, height, width = model_inputs["hidden_states"].shape
        dims = StepDims.of(
            batch=batch,
            latent_height=height,
            latent_width=width,
            patch_size=engine.config["patch_size"],
            text_length=engine.family.text_length(model_inputs),
            num_kept=0,
        )
        for name, expected in engine.family.input_shapes(engine.config, dims).items():
            if tuple(model_inputs[name].shape) != expected:
                raise ShapeError(f"{name} has shape {tuple(model_inputs[name].shape)}, expected {expected}")
        return dims
