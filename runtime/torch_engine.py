"""The intercepted diffusers module as a step engine: the reference for parity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cat_pruning.exporter.families import family_of_class
from cat_pruning.exporter.interception import StepModule
from cat_pruning.plugins.token_ops import token_scatter_
from cat_pruning.runtime.step_engine import StepEngine, StepSession
from cat_pruning.step_io import LATENTS, TIMESTEP, StepDims


class TorchStepEngine(StepEngine):
    """Runs a diffusers transformer where its weights are. The given module is not changed.

    Raises:
        CheckpointError: a transformer of no supported class.
    """

    name = "torch"

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.family = family_of_class(type(transformer).__name__)
        self.config = transformer.config

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # follows the module when it moves
        """Where the module's weights are."""
        device: torch.device = next(self.transformer.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the module's weights."""
        dtype: torch.dtype = next(self.transformer.parameters()).dtype
        return dtype

    def session(self) -> TorchSession:
        """See `StepEngine.session`."""
        return TorchSession(self)


class TorchSession(StepSession):
    """Caches updated in place by an intercepted copy of the module, which shares its weights."""

    engine: TorchStepEngine

    def __init__(self, engine: TorchStepEngine) -> None:
        super().__init__(engine)
        self._step: StepModule | None = None
        self._caches: list[Tensor] = []
        self._conditioning: dict[str, Tensor] = {}

    def _allocate(self, dims: StepDims) -> None:
        engine = self.engine
        self._caches = [
            torch.zeros([int(dim) for dim in spec.shape(dims)], dtype=engine.dtype, device=engine.device)
            for spec in engine.family.caches(engine.config)
            for _ in range(2)
        ]

    def _begin(self, dims: StepDims, conditioning: dict[str, Tensor], timesteps: Sequence[float]) -> None:
        # Anew for every image: the copy shares the module's parameters, but not what has been done to it since, such as
        # adapters loaded or switched off, or a move, which replaces buffers.
        self._step = StepModule(self.engine.transformer, self.engine.family, token_scatter_)
        self._conditioning = conditioning

    def _run(self, latents: Tensor, timestep: float, keep_indices: Tensor, noise: Tensor) -> Tensor:
        assert self._step is not None
        timesteps = torch.full(latents.shape[:1], timestep, device=latents.device)
        inputs = {LATENTS: latents, TIMESTEP: self.to_engine(TIMESTEP, timesteps), **self._conditioning}
        with torch.no_grad():  # and not inference_mode: schedulers may write to what they are given
            # A copy, because the kept rows are scattered in place, in FLUX into the very tensor that is given.
            result: Tensor = self._step(keep_indices, noise.clone(), self._caches, inputs)[0]
            return result
