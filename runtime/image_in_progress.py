"""Algorithm 2 over the calls of one image (or batch of images)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cat_pruning.engines.session_pool import Lease, SessionPool
from cat_pruning.engines.step_engine import StepSession, ordinary_tensors
from cat_pruning.runtime.image import Image, Memory, every_token
from cat_pruning.runtime.outputs import Outputs
from cat_pruning.runtime.record import StepRecord
from cat_pruning.runtime.selection.policies import SELECTORS
from cat_pruning.runtime.selection.selector import Selector, negative_rows
from cat_pruning.runtime.side_branch import SideBranch
from cat_pruning.runtime.step_call import StepCall
from cat_pruning.runtime.timesteps import NoiseLevel
from cat_pruning.schedule import FULL_STEP, ScheduledStep, StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import LATENTS
from cat_pruning.timeline import at_timesteps, begun_late, last_read, reference_step, scheduled_step


class ImageInProgress:
    """The steps of one image, and the calls beside them.

    A step is one noise level: schedulers of second order (Heun) call the model twice at the same timestep, and both
    calls compute the same tokens.

    Its memory may be lost between two steps: taken away for another image, or of no use because guidance was switched
    on or off and it has other rows now. It goes on at the same place of its timeline; the next step that computes
    tokens computes all of them.

    Args:
        pool: lends it a session.
        settings: what to compute on which step.
        is_kept: whether the session is lent until `close`.
        computes_all: whether every step is full, whatever the settings say.

    Attributes:
        image: what holds for all of its calls; None before the first.
        timesteps: of its steps so far.
        record: of its last step; None before the first.
        selector: chooses the tokens of pruned steps; None where there are none.
    """

    def __init__(
        self, pool: SessionPool, settings: PruneSettings, *, is_kept: bool = False, computes_all: bool = False
    ) -> None:
        self._pool, self._is_kept, self.computes_all = pool, is_kept, computes_all
        self.settings = settings
        self.image: Image | None = None
        self.timesteps: list[float] = []
        self.record: StepRecord | None = None
        self.selector: Selector | None = None
        self._lease: Lease | None = None
        self._branches: dict[str, SideBranch] = {}
        self._latents: Memory | None = None  # of its last call
        self._outputs = Outputs(pool.engine.family)
        self._negative: Tensor | None = None  # (B,), once it is known
        self._noise: Tensor | None = None  # every token's as it was last computed
        self._is_fresh = True  # nothing was computed in the session as it is
        self._reference = reference_step(settings)

    @property
    def session(self) -> StepSession:
        """That it has, or had last."""
        assert self._lease is not None
        return self._lease.session

    @property
    def timestep(self) -> float:
        """Of its last step; infinite before the first."""
        return self.timesteps[-1] if self.timesteps else math.inf

    @property
    def is_over(self) -> bool:
        """Whether no call of it can come, as far as is known."""
        return self.image is not None and self.image.is_over()

    @property
    def has_no_schedule(self) -> bool:
        """Whether its pipeline hides its schedule."""
        return self.image is not None and self.image.level.schedule is None

    def has_conditioning(self, call: StepCall, level: NoiseLevel) -> bool:
        """Whether a call has the shapes and the conditioning of its last one: see `Image.difference`."""
        return self.image is not None and self.image.difference(call, level) is None

    def close(self) -> None:
        """Give back what was lent. The image is over."""
        leases = [self._lease, *(branch.lease for branch in self._branches.values())]
        for lease in reversed(leases):  # so that the next image's calls get the sessions that this one's had
            if lease is not None:
                lease.give_back()

    def difference(self, call: StepCall, level: NoiseLevel) -> str | None:
        """What tells that a call is not the image's next one, or another one at its level; None: nothing does."""
        if self.image is None:
            return None
        if self.has_other_schedule(level):
            return "the pipeline set another schedule"
        if level.timestep > self.timestep:
            return f"the timestep rose from {self.timestep:g} to {level.timestep:g}"
        difference = self.image.difference(call, level)
        return None if difference and self._has_guidance_switched(call, level) else difference

    def has_other_schedule(self, level: NoiseLevel) -> bool:
        """Whether a call is in another schedule than the last one."""
        schedules = (level.schedule, self.image.level.schedule if self.image else None)
        return None not in schedules and schedules[0] is not schedules[1]

    def is_repeated(self, call: StepCall) -> bool:
        """Whether a call has the latents of the image's last one. Synchronises where they are in other memory."""
        return self._latents is not None and self._latents.equals(call.latents)

    def is_beside(self, call: StepCall, level: NoiseLevel, branch: str) -> bool:
        """Whether a call is the other one of guidance in a pipeline that does not say so by a `cache_context`.

        Such pipelines (FLUX's, but for text-to-image) call the model with the prompt, then with the negative one and
        the same latents. Two images stepped in turn have other latents, at their second step at the latest, and
        an image that begins with another's latents and its prompt is no guidance. Synchronises at the first two levels.
        """
        if self.image is None or level.timestep != self.timestep or self.has_other_schedule(level):
            return False
        if self.image.is_gone or self.has_conditioning(call, level) or not self.image.is_for(call.latents):
            return False
        known = self._branches.get(branch)
        if known is not None and known.holds(call, level):
            return known.num_levels > 1 or self.is_repeated(call)
        return self.is_repeated(call) and not self.image.has_values(call.arguments)

    def call(
        self, call: StepCall, level: NoiseLevel, expected: Sequence[float] = (), *, is_known: bool = False
    ) -> Tensor:
        """Compute a call of the image itself. After a failure the image is half way and closed.

        Args:
            call: what it passes.
            level: where it is.
            expected: the timesteps that will come, in order, as far as they are known.
            is_known: whether `difference` was asked of the call, and found nothing.

        Returns:
            The noise prediction, in the engine's dtype and the transformer's layout.
        """
        try:
            with ordinary_tensors():
                self._resume(call, level, expected, is_known=is_known)
                assert self.image is not None
                assert self._lease is not None
                self.image.level, self._latents = level, Memory(call.latents)
                output = self._compute(call, level)
        except BaseException:
            self.close()
            raise
        self._lease.rest()
        return output

    def call_beside(self, name: str, call: StepCall, level: NoiseLevel, expected: Sequence[float] = ()) -> Tensor:
        """Compute a call that is no step of the image itself, but goes with one: see `SideBranch`."""
        if name not in self._branches:
            self._branches[name] = SideBranch(self._pool, is_kept=self._is_kept)
        step = self.record if self.record and level.timestep == self.record.timestep else None
        last = last_read(step.step, self.settings) if step else 0
        return self._branches[name].call(call, level, step, expected, last)

    def _resume(self, call: StepCall, level: NoiseLevel, expected: Sequence[float], *, is_known: bool) -> None:
        """Have a session that knows the call's conditioning."""
        if self.image is None:
            self.settings = _settings_for(self.settings, level)
            self._reference = reference_step(self.settings)
        if self._lease is not None and not self._lease.resume():
            self._lease = None
        image = self.image
        if image is not None and not image.is_for(call.latents):
            self._change_rows(image.rows_of(call))
        elif self._lease is not None and (is_known or self.has_conditioning(call, level)):
            return
        self._begin(call, level, expected)

    def _begin(self, call: StepCall, level: NoiseLevel, expected: Sequence[float]) -> None:
        family = self._pool.engine.family
        self.image = image = Image(family, call, level)
        if self._lease is None:
            self._lease = self._pool.take(image.dims, image.is_over, is_kept=self._is_kept)
        self._lease.is_over = image.is_over
        self.selector = self._selector(image)
        dims = dataclasses.replace(image.dims, num_kept=self.selector.num_kept if self.selector else 0)
        self.session.begin(dims, family.conditioning(call.arguments, image.grid), expected)
        self._is_fresh, self._negative = True, None

    def _selector(self, image: Image) -> Selector | None:
        """The session's last one, whose captured steps can be replayed, if it was for images like this one."""
        engine = self._pool.engine
        if self.computes_all or not self.settings.num_kept(math.prod(image.grid)):
            return None
        assert self._lease is not None
        needed, kept = (self.settings, image.dims, engine.device, engine.dtype), self._lease.kept
        if needed not in kept:
            kept.clear()
            shape = [int(size) for size in engine.family.noise_shape(image.dims)]
            noise = torch.empty(shape, dtype=engine.dtype, device=engine.device)
            kept[needed] = SELECTORS[self.settings.policy](engine.family, self.settings, image.grid, noise)
        selector: Selector = kept[needed]
        selector.reset()
        return selector

    def _has_guidance_switched(self, call: StepCall, level: NoiseLevel) -> bool:
        """Whether a call at the schedule's next level has some of the image's rows, or has them after others."""
        image, is_guided = self.image, self._pool.engine.family.batched_guidance
        if image is None or not is_guided or image.is_for(call.latents):
            return False
        if level.schedule is None or level.schedule is not image.level.schedule or level.timestep == self.timestep:
            return False
        return image.rows_of(call) is not None or image.is_within(call)

    def _change_rows(self, rows: slice | None) -> None:
        """Go on with these rows of what was computed; with none of it if there are others."""
        self._noise = self._noise[rows] if self._noise is not None and rows is not None else None
        if rows is None:
            self._outputs.reset()
        else:
            self._outputs.take_rows(rows)

    def _compute(self, call: StepCall, level: NoiseLevel) -> Tensor:
        if self.record is None or level.timestep != self.timestep:
            self.timesteps.append(level.timestep)
            self.record = self._step(call, level)
        elif self.record.num_kept:
            is_whole = self._is_fresh or self.record.kind is StepKind.FULL
            self._run(call, level, self._every_token(call.latents) if is_whole else self.record.keep_indices)
        record, noise = self.record, self._noise
        assert noise is not None
        if self.selector is not None and record.step == self._reference:
            self.selector.refer_to(noise)
        if self._negative is None and self._needs_negative:
            self._negative = negative_rows(call.latents).to(noise.device)
        output = self._outputs.of(noise, record.row, record.keep_indices, self._negative)
        if record.num_kept:
            self._outputs.keep(record.step, output, last_read(record.step, self.settings))
        return output

    def _step(self, call: StepCall, level: NoiseLevel) -> StepRecord:
        number, row = self._row(level)
        if row.kind is StepKind.FULL or (row.kind is StepKind.PRUNED and self.selector is not None):
            if self._is_fresh and number > self._reference:
                self._reference = number  # of an image that begins after it, or has lost it
            self._run(call, level, self._tokens(row.kind, call.latents))
            computed = self.session.computed
        else:
            computed = torch.empty((call.latents.shape[0], 0), dtype=torch.int32, device=self._pool.engine.device)
        assert self.image is not None
        return StepRecord(
            step=number,
            row=row,
            timestep=level.timestep,
            grid=self.image.grid,
            keep_indices=computed,
            cluster_ids=self.selector.cluster_ids if self.selector else None,
        )

    def _run(self, call: StepCall, level: NoiseLevel, tokens: Tensor | Selector) -> None:
        latents = self.session.to_engine(LATENTS, call.latents)
        self._noise = self.session.step(latents, level.timestep, tokens, call.residuals)
        self._is_fresh = False

    def _row(self, level: NoiseLevel) -> tuple[int, ScheduledStep]:
        """The step's number and row; a full one instead of one that reads what this image has not computed."""
        table = self.settings.schedule
        number = len(self.timesteps) - 1
        if table is not None and table.timesteps is not None:
            number = table.number_at(level.timestep, level.precision)
        row = scheduled_step(number, self.timesteps, self.settings)
        is_possible = self._noise is not None and self._outputs.has(row) and not self.computes_all
        if row.kind is StepKind.PRUNED and self.selector is not None:
            is_possible = is_possible and not self._is_fresh
        return number, row if is_possible else FULL_STEP

    def _tokens(self, kind: StepKind, latents: Tensor) -> Tensor | Selector:
        """The tokens of a step, or their choice within the step."""
        if kind is not StepKind.FULL:
            assert self.selector is not None
            assert self._noise is not None
            return self.selector if self.selector.has_begun else self.selector.first(latents, self._noise)
        tokens = self._every_token(latents)
        if self.selector is not None:
            self.selector.count(tokens)
        return tokens

    def _every_token(self, latents: Tensor) -> Tensor:
        """The last step's, where that was full too."""
        last, shape = self.record, (latents.shape[0], self._num_tokens)
        return (
            last.keep_indices
            if last is not None and last.keep_indices.shape == shape
            else every_token(latents, shape[1])
        )

    @property
    def _num_tokens(self) -> int:
        assert self.image is not None
        return int(self.image.dims.num_tokens)

    @property
    def _needs_negative(self) -> bool:
        table = self.settings.schedule
        is_guided = self._pool.engine.family.batched_guidance
        return is_guided and table is not None and any(step.negative for step in table.steps)


def _settings_for(settings: PruneSettings, level: NoiseLevel) -> PruneSettings:
    """The settings of an image that begins at a noise level.

    Raises:
        ScheduleError: their schedule is of other timesteps.
    """
    settings = at_timesteps(settings, level.expected, level.precision)
    table = settings.schedule
    number = table.number_at(level.timestep, level.precision) if table is not None and table.timesteps else 0
    return begun_late(settings, table.num_steps - number) if table is not None and number else settings
