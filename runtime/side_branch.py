"""Calls of the transformer that belong to an image's steps without being steps themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from cat_pruning.engines.step_engine import StepSession
from cat_pruning.runtime.extrapolation import Extrapolation
from cat_pruning.runtime.image import Image, every_token
from cat_pruning.runtime.record import StepRecord
from cat_pruning.settings import Reuse
from cat_pruning.step_io import LATENTS


class SideBranch:
    """Calls that a pipeline makes beside those of the image: skip-layer guidance, true guidance in FLUX.

    They are at the image's noise level, for its last rows, and get the tokens of its step, but caches of their own. A
    branch whose caches are not of the step before computes every token. What the image does is not changed by them.
    """

    def __init__(self, session: StepSession) -> None:
        self.session = session
        self._extrapolation = Extrapolation(session.engine.family)
        self.reset()

    def reset(self) -> None:
        """Forget the image."""
        self.session.reset()
        self._extrapolation.reset()
        self._image: Image | None = None
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
        reuse: Reuse,
    ) -> Tensor:
        """Compute one call.

        Args:
            latents: as for `Sampling.call`.
            timestep: its value.
            arguments: as for `Sampling.call`.
            skip_layers: blocks that it leaves out.
            step: what the image computes at this timestep; None if it does not.
            timesteps: those that are expected.
            reuse: what tokens that are not computed contribute.
        """
        if self._image is None or self._skipped != skip_layers or not self._image.holds(latents, arguments):
            self._begin(latents, arguments, skip_layers, timesteps)
        assert self._image is not None
        latents = self.session.to_engine(LATENTS, latents)
        rows, num_tokens = latents.shape[0], int(self._image.dims.num_tokens)
        tokens = every_token(latents, num_tokens)
        if step is not None and self._last_step in (step.step, step.step - 1) and step.keep_indices.shape[0] >= rows:
            tokens = step.keep_indices[-rows:]
        try:
            noise = self.session.step(latents, timestep, tokens)
        except BaseException:
            self.reset()
            raise
        self._last_step = step.step if step else None
        return self._extrapolation(noise, timestep, tokens) if reuse is Reuse.EXTRAPOLATE else noise

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
