"""Calls of the transformer that belong to an image's steps without being steps themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cat_pruning.engines.session_pool import Lease, SessionPool
from cat_pruning.engines.step_engine import ordinary_tensors
from cat_pruning.runtime.image import Image, every_token
from cat_pruning.runtime.outputs import Outputs
from cat_pruning.runtime.record import StepRecord
from cat_pruning.runtime.step_call import StepCall
from cat_pruning.runtime.timesteps import NoiseLevel
from cat_pruning.schedule import FULL_STEP
from cat_pruning.step_io import LATENTS


class SideBranch:
    """Calls that a pipeline makes beside those of the image: skip-layer guidance, true guidance in FLUX.

    They are at the image's noise level, for its last rows, and get the tokens of its step, but caches of their own. A
    branch whose caches are not of the step before computes every token. What the image does is not changed by them.

    Args:
        pool: lends it a session.
        is_kept: whether that is lent until it is given back.

    Attributes:
        lease: of its session; None before the first call.
        num_levels: how many noise levels it was called at since it began.
    """

    def __init__(self, pool: SessionPool, *, is_kept: bool = False) -> None:
        self._pool, self._is_kept = pool, is_kept
        self._outputs = Outputs(pool.engine.family)
        self.lease: Lease | None = None
        self._forget()

    def _forget(self) -> None:
        self._outputs.reset()
        self._image: Image | None = None
        self._noise = torch.empty(0)  # every token's as it was last computed
        self._skipped: tuple[int, ...] = ()
        self._last_step: int | None = None
        self.num_levels = 0

    def holds(self, call: StepCall, level: NoiseLevel) -> bool:
        """Whether a call has the shapes and the conditioning of its last one: see `Image.difference`."""
        return self._image is not None and self._image.difference(call, level) is None

    def call(
        self,
        call: StepCall,
        level: NoiseLevel,
        step: StepRecord | None,
        expected: Sequence[float],
        last_read: float,
    ) -> Tensor:
        """Compute one call. After a failure it begins anew.

        Args:
            call: what it passes.
            level: where it is.
            step: what the image computes at this timestep; None if it does not.
            expected: the timesteps that will come.
            last_read: the image's last step that reads this one.
        """
        try:
            with ordinary_tensors():
                return self._call(call, level, step, expected, last_read)
        except BaseException:
            self._forget()
            raise
        finally:
            if self.lease is not None:
                self.lease.rest()

    def _call(
        self,
        call: StepCall,
        level: NoiseLevel,
        step: StepRecord | None,
        expected: Sequence[float],
        last_read: float,
    ) -> Tensor:
        if self.lease is not None and not self.lease.resume():
            self.lease = None
        is_going_on = self.lease is not None and self._skipped == call.skip_layers and self.holds(call, level)
        if not is_going_on:
            self._begin(call, level, expected)
        assert self._image is not None
        assert self.lease is not None
        self.num_levels += level.timestep != self._image.level.timestep or not self.num_levels
        self._image.level = level
        rows = call.latents.shape[0]
        if step is not None and self._follows(step, rows):
            tokens, row = step.keep_indices[-rows:], step.row
        else:
            tokens, row = every_token(call.latents, int(self._image.dims.num_tokens)), FULL_STEP
        if tokens.shape[1]:
            session = self.lease.session
            latents = session.to_engine(LATENTS, call.latents)
            self._noise = session.step(latents, level.timestep, tokens, call.residuals)
        self._last_step = step.step if step else None
        output = self._outputs.of(self._noise, row, tokens)
        if step is not None and tokens.shape[1]:
            self._outputs.keep(step.step, output, last_read)
        return output

    def _follows(self, step: StepRecord, rows: int) -> bool:
        """Whether the branch has what the image's step goes on from."""
        is_next = self._last_step in (step.step, step.step - 1)
        return is_next and self._outputs.has(step.row) and step.keep_indices.shape[0] >= rows

    def _begin(self, call: StepCall, level: NoiseLevel, expected: Sequence[float]) -> None:
        self._forget()
        family = self._pool.engine.family
        image = Image(family, call, level)
        if self.lease is None:
            self.lease = self._pool.take(image.dims, image.is_over, is_kept=self._is_kept)
        self.lease.is_over = image.is_over
        conditioning = family.conditioning(call.arguments, image.grid)
        if call.skip_layers:
            conditioning = family.without_layers(conditioning, call.skip_layers)
        self.lease.session.begin(image.dims, conditioning, expected)
        self._image, self._skipped = image, call.skip_layers
