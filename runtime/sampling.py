"""One image (or batch of images) in progress: where it is in its schedule, and what it computes next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from cat_pruning.engines.step_engine import StepSession, ordinary_tensors
from cat_pruning.runtime.extrapolation import Extrapolation
from cat_pruning.runtime.image import Image, every_token
from cat_pruning.runtime.record import StepRecord
from cat_pruning.runtime.selection.policies import SELECTORS
from cat_pruning.runtime.selection.selector import Selector
from cat_pruning.runtime.side_branch import SideBranch
from cat_pruning.runtime.timesteps import TimestepReader
from cat_pruning.schedule import StepKind, schedule
from cat_pruning.settings import PruneSettings, Reuse
from cat_pruning.step_io import LATENTS

_ANOTHER_PROMPT = "another prompt"  # the side branch of calls that no context names


class Sampling:
    """Algorithm 2 over the calls that a diffusers pipeline makes, for one thread.

    A step is one noise level: schedulers of second order (Heun) call the model twice at the same timestep,
    and both calls compute the same tokens. A new image begins when the pipeline sets a new schedule, when the
    timestep goes up, or when the conditioning or a shape changes; so an image that was broken off leaves no
    trace in the next one. The first `full_steps` steps of every image are full, wherever in the schedule it
    starts, so an image-to-image run with fewer steps is never pruned.

    Calls on the side of the image, as for skip-layer guidance, are no steps: see `SideBranch`.
    """

    def __init__(self, session: StepSession, settings: PruneSettings) -> None:
        self.session = session
        self.settings = settings
        self.record: StepRecord | None = None  # of the last step
        self._timesteps = TimestepReader()
        self._branches: dict[str, SideBranch] = {}
        self._selector: Selector | None = None
        self._selector_is_for: object = None
        self._extrapolation = Extrapolation(session.engine.family, session.engine.config)
        self._past: list[float] = []  # the timesteps of the last image
        self._forget()

    def reset(self) -> None:
        """Forget the image in progress."""
        self.session.reset()
        self._extrapolation.reset()
        for branch in self._branches.values():
            branch.reset()
        self._forget()

    def _forget(self) -> None:
        self._step = -1
        self._new_schedule = False  # seen by a call beside the image
        self._timestep = float("inf")
        self._image: Image | None = None
        self._seen: list[float] = []  # the timesteps of this image
        self._keep_indices: Tensor | None = None  # (B, n) of the step in progress
        self._noise: Tensor | None = None  # the last output

    def call(self, latents: Tensor, timestep: Tensor, arguments: Mapping[str, Tensor]) -> Tensor:
        """Compute one call of the transformer: `StepSession.step` on the tokens of this step.

        Args:
            latents: the transformer's `hidden_states`, in the pipeline's dtype, wherever they are.
            timestep: (B,) or scalar, all entries alike.
            arguments: the family's arguments by diffusers' names, likewise.

        Returns:
            The noise prediction, in the engine's dtype and the transformer's layout.

        Once per image the clusters are found and the timesteps are read, which synchronises with a GPU when they
        are on it; nothing else here does, unless a pipeline passes timesteps that are no view of a schedule (FLUX).
        """
        value, new_schedule = self._timesteps.read(timestep)
        is_new = self._noise is None or new_schedule or self._new_schedule or value > self._timestep
        if not is_new and self._is_beside(latents, value, arguments):
            return self.call_beside(_ANOTHER_PROMPT, latents, timestep, arguments)
        if is_new or self._image is None or not self._image.holds(latents, arguments):
            self._begin_image(latents, arguments)
        assert self._image is not None
        try:
            with ordinary_tensors():
                return self._compute(self.session.to_engine(LATENTS, latents), value)
        except BaseException:
            self.reset()  # a step may have begun that was never computed
            raise

    def _compute(self, latents: Tensor, timestep: float) -> Tensor:
        assert self._selector is not None
        if timestep != self._timestep:
            tokens = self._begin_step(timestep, latents)
            self._noise = self.session.step(latents, timestep, tokens)
            self._end_step()
        else:
            assert self._keep_indices is not None
            self._noise = self.session.step(latents, timestep, self._keep_indices)
        if self._step == self.settings.reference_step:
            self._selector.refer_to(self._noise)
        if self.settings.reuse is Reuse.EXTRAPOLATE:
            assert self._keep_indices is not None
            return self._extrapolation(self._noise, timestep, self._keep_indices)
        return self._noise

    def call_beside(
        self,
        name: str,
        latents: Tensor,
        timestep: Tensor,
        arguments: Mapping[str, Tensor],
        skip_layers: tuple[int, ...] = (),
    ) -> Tensor:
        """Compute a call that is no step of the image itself, but goes with one: see `SideBranch`."""
        if name not in self._branches:
            self._branches[name] = SideBranch(self.session.engine.session())
        value, new_schedule = self._timesteps.read(timestep)
        self._new_schedule |= new_schedule  # the image's next call begins a new one
        tokens = self._keep_indices if value == self._timestep else None
        step = self._step if value == self._timestep else None
        return self._branches[name].call(
            latents, value, arguments, skip_layers, tokens, step, self._expected(), self.settings.reuse
        )

    def _is_beside(self, latents: Tensor, timestep: float, arguments: Mapping[str, Tensor]) -> bool:
        """Whether a call is the other one of true guidance, in a pipeline that does not say so by a `cache_context`.

        Such pipelines (FLUX's, but for text-to-image) call the model with the prompt, then with the negative one.
        """
        image = self._image
        return (
            image is not None
            and not self.session.engine.family.batched_guidance
            and timestep == self._timestep
            and image.is_for(latents)
            and not image.holds(latents, arguments)
        )

    def _expected(self) -> list[float]:
        """The timesteps that will come: the schedule's, or where the pipeline hides it, those of the last image."""
        return self._timesteps.schedule or self._past

    def _begin_image(self, latents: Tensor, arguments: Mapping[str, Tensor]) -> None:
        self._past = self._seen or self._past
        self.reset()
        image = Image(self.session, latents, arguments)
        self._selector = self._selector_for(image)
        dims = dataclasses.replace(image.dims, num_kept=self._selector.num_kept)
        self.session.begin(dims, image.conditioning, self._expected())
        self._image = image

    def _selector_for(self, image: Image) -> Selector:
        """The last image's, whose captured steps can be replayed, if it was for images like this one."""
        engine = self.session.engine
        needed = (self.settings, image.dims, engine.device, engine.dtype)
        if needed != self._selector_is_for or self._selector is None:
            selector = SELECTORS[self.settings.policy]
            self._selector = selector(engine.family, engine.config, self.settings, image.grid, engine.device)
            self._selector_is_for = needed
        self._selector.reset()
        return self._selector

    def _begin_step(self, timestep: float, latents: Tensor) -> Tensor | Selector:
        """What the step computes."""
        assert self._image is not None
        assert self._selector is not None
        self._step += 1
        self._timestep = timestep
        self._seen.append(timestep)
        if schedule(self._step, self.settings) is StepKind.FULL:
            num_tokens = int(self._image.dims.num_tokens)
            if self._keep_indices is None or self._keep_indices.shape[1] != num_tokens:
                self._keep_indices = every_token(latents, num_tokens)
            self._selector.count(self._keep_indices)
            return self._keep_indices
        if self._selector.num_kept and not self._selector.has_begun:
            assert self._noise is not None
            return self._selector.first(latents, self._noise)
        return self._selector

    def _end_step(self) -> None:
        assert self._image is not None
        assert self._selector is not None
        self._keep_indices = self.session.computed
        self.record = StepRecord(
            step=self._step,
            kind=schedule(self._step, self.settings),
            timestep=self._timestep,
            grid=self._image.grid,
            keep_indices=self._keep_indices,
            cluster_ids=self._selector.cluster_ids,
        )
