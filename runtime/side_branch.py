"""Calls of the transformer that belong to an image's steps without being steps themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cat_pruning.engines.step_engine import StepSession
from cat_pruning.runtime.image import Image, every_token
from cat_pruning.runtime.outputs import Outputs
from cat_pruning.runtime.record import StepRecord
from cat_pruning.schedule import FULL_STEP
from cat_pruning.step_io import LATENTS


class SideBranch:
    """Calls that a pipeline makes beside those of the image: skip-layer guidance, true guidance in FLUX.

    They are at the image's noise level, for its last rows, and get the tokens of its step, but caches of their own. A
    branch whose caches are not of the step before computes every token. What the image does is not changed by them.
    """

    def __init__(self, session: StepSession) -> None:
        self.session = session
        self._outputs = Outputs(session.engine.family)
        self.reset()

    def reset(self) -> None:
        """Forget the image."""
        self.session.reset()
        self._outputs.reset()
        self._image: Image | None = None
        self._noise = torch.empty(0)  # every token's as it was last computed
        self._skipped: tuple[int, ...] = ()
        self._last_step: int | None = None

    def call(
        self,
        latents: Tensor,
        timestep: float,
        arguments: Mapping[str, Tensor],
        skip_layers: tuple[int, ...],
        step: StepRecord | None,
        timesteps: Sequence[float],
        last_read: float,
    ) -> Tensor:
        """Compute one call.

        Args:
            latents: as for `Sampling.call`.
            timestep: its value.
            arguments: as for `Sampling.call`.
            skip_layers: blocks that it leaves out.
            step: what the image computes at this timestep; None if it does not.
            timesteps: those that are expected.
            last_read: the image's last step that reads this one.
        """
        if self._image is None or self._skipped != skip_layers or not self._image.holds(latents, arguments):
            self._begin(latents, arguments, skip_layers, timesteps)
        assert self._image is not None
        rows = latents.shape[0]
        if step is not None and self._follows(step, rows):
            tokens, row = step.keep_indices[-rows:], step.row
        else:
            tokens, row = every_token(latents, int(self._image.dims.num_tokens)), FULL_STEP
        try:
            if tokens.shape[1]:
                self._noise = self.session.step(self.session.to_engine(LATENTS, latents), timestep, tokens)
        except BaseException:
            self.reset()
            raise
        self._last_step = step.step if step else None
        output = self._outputs.of(self._noise, row, tokens)
        if step is not None and tokens.shape[1]:
            self._outputs.keep(step.step, output, last_read)
        return output

    def _follows(self, step: StepRecord, rows: int) -> bool:
        """Whether the branch has what the image's step goes on from."""
        is_next = self._last_step in (step.step, step.step - 1)
        return is_next and self._outputs.has(step.row) and step.keep_indices.shape[0] >= rows

    def _begin(
        self,
        latents: Tensor,
        arguments: Mapping[str, Tensor],
        skip_layers: tuple[int, ...],
        timesteps: Sequence[float],
    ) -> None:
        self.reset()
        engine, image = self.session.engine, Image(self.session, latents, arguments)
        conditioning = image.conditioning
        if skip_layers:
            conditioning = engine.family.without_layers(conditioning, skip_layers)
        self.session.begin(image.dims, conditioning, timesteps)
        self._image, self._skipped = image, skip_layers
