"""The images that a diffusers pipeline makes one after another: where each call belongs, and what it computes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cat_pruning.engines.step_engine import StepSession, ordinary_tensors
from cat_pruning.runtime.image import Image, every_token
from cat_pruning.runtime.outputs import Outputs
from cat_pruning.runtime.record import StepRecord
from cat_pruning.runtime.selection.policies import SELECTORS
from cat_pruning.runtime.selection.selector import Selector, negative_rows
from cat_pruning.runtime.side_branch import SideBranch
from cat_pruning.runtime.timesteps import TimestepReader, precision_of
from cat_pruning.schedule import FULL_STEP, ScheduledStep, StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import LATENTS
from cat_pruning.timeline import begun_late, last_read, reference_step, scheduled_step

_ANOTHER_PROMPT = "another prompt"  # the side branch of calls that no context names


class ImageInProgress:
    """Algorithm 2 over the steps of one image (or batch of images).

    A step is one noise level: schedulers of second order (Heun) call the model twice at the same timestep, and both
    calls compute the same tokens.

    Args:
        image: its shapes and conditioning, which the session has begun with.
        session: computes it.
        settings: what to compute on which step.
        selector: chooses the tokens of pruned steps; None where there are none.

    Attributes:
        timesteps: of its steps so far.
        record: of its last step; None before the first.
    """

    def __init__(self, image: Image, session: StepSession, settings: PruneSettings, selector: Selector | None) -> None:
        self.image, self.session, self.settings, self.selector = image, session, settings, selector
        self.timesteps: list[float] = []
        self.record: StepRecord | None = None
        self._reference_step = reference_step(settings)
        family, table = session.engine.family, settings.schedule
        self._outputs = Outputs(family)
        self._needs_negative = (
            family.batched_guidance and table is not None and any(step.negative for step in table.steps)
        )
        self._negative: Tensor | None = None  # (B,), once it is known
        self._noise = torch.empty(0)  # every token's as it was last computed

    @property
    def timestep(self) -> float:
        """Of its last step; infinite before the first."""
        return self.timesteps[-1] if self.timesteps else math.inf

    def compute(self, latents: Tensor, timestep: float, precision: float) -> Tensor:
        """The prediction of one call.

        A failure leaves the image half way: it is to be forgotten.

        Args:
            latents: of the call, as they came.
            timestep: its value.
            precision: machine epsilon of the dtype that the timestep came in.
        """
        if self.record is None or timestep != self.timestep:
            self.timesteps.append(timestep)
            self.record = self._step(latents, timestep, precision)
        elif self.record.num_kept:
            latents = self.session.to_engine(LATENTS, latents)
            self._noise = self.session.step(latents, timestep, self.record.keep_indices)
        record = self.record
        if self.selector is not None and self._is_reference(record.step):
            self.selector.refer_to(self._noise)
        if self._negative is None and self._needs_negative:
            self._negative = negative_rows(latents).to(self._noise.device)
        output = self._outputs.of(self._noise, record.row, record.keep_indices, self._negative)
        if record.num_kept:
            self._outputs.keep(record.step, output, last_read(record.step, self.settings))
        return output

    def _step(self, latents: Tensor, timestep: float, precision: float) -> StepRecord:
        number, row = self._row(timestep, precision)
        if row.kind is StepKind.FULL or (row.kind is StepKind.PRUNED and self.selector is not None):
            latents = self.session.to_engine(LATENTS, latents)
            self._noise = self.session.step(latents, timestep, self._tokens(row.kind, latents))
            computed = self.session.computed
        else:
            computed = self._noise.new_empty((latents.shape[0], 0), dtype=torch.int32)
        return StepRecord(
            step=number,
            row=row,
            timestep=timestep,
            grid=self.image.grid,
            keep_indices=computed,
            cluster_ids=self.selector.cluster_ids if self.selector else None,
        )

    def _is_reference(self, number: int) -> bool:
        """Whether a step is t0; in an image that begins after it, the first one is."""
        is_first = len(self.timesteps) == 1
        return number == self._reference_step or (is_first and number > self._reference_step)

    def _row(self, timestep: float, precision: float) -> tuple[int, ScheduledStep]:
        """The step's number and row; a full one instead of one that reads what this image has not computed."""
        table = self.settings.schedule
        number = len(self.timesteps) - 1
        if table is not None and table.timesteps is not None:
            number = table.number_at(timestep, precision)
        row = scheduled_step(number, self.timesteps, self.settings)
        is_possible = self._outputs.has(row) and (self.record is not None or row.kind is StepKind.FULL)
        return number, row if is_possible else FULL_STEP

    def _tokens(self, kind: StepKind, latents: Tensor) -> Tensor | Selector:
        """The tokens of a step, or their choice within the step."""
        if kind is StepKind.FULL:
            return self._every_token(latents)
        assert self.selector is not None
        return self.selector if self.selector.has_begun else self.selector.first(latents, self._noise)

    def _every_token(self, latents: Tensor) -> Tensor:
        num_tokens, last = int(self.image.dims.num_tokens), self.record
        was_full = last is not None and last.num_kept == num_tokens
        tokens = last.keep_indices if last is not None and was_full else every_token(latents, num_tokens)
        if self.selector is not None:
            self.selector.count(tokens)
        return tokens


class Sampling:
    """The images of one thread, told apart by the calls that its pipeline makes.

    A new image begins when the pipeline sets a new schedule, when the timestep goes up, or when the conditioning or a
    shape changes; so an image that was broken off leaves no trace in the next one. The first `full_steps` steps of
    every image are full, wherever in the schedule it starts, so an image-to-image run with fewer steps is never pruned.

    Calls on the side of the image, as for skip-layer guidance, are no steps: see `SideBranch`.
    """

    def __init__(self, session: StepSession, settings: PruneSettings) -> None:
        self.session = session
        self.settings = settings
        self._timesteps = TimestepReader()
        self._branches: dict[str, SideBranch] = {}
        self._selectors: dict[object, Selector] = {}  # the last image's, by what it is for
        self._past: list[float] = []  # the timesteps of the last image
        self._forget()

    @property
    def record(self) -> StepRecord | None:
        """What the last step of the image in progress computed."""
        return self._image.record if self._image else None

    def reset(self) -> None:
        """Forget the image in progress."""
        self.session.reset()
        for branch in self._branches.values():
            branch.reset()
        self._forget()

    def _forget(self) -> None:
        self._image: ImageInProgress | None = None
        self._new_schedule = False  # seen by a call beside the image

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
        current = None if new_schedule or self._new_schedule else self._image
        if current is not None and value > current.timestep:
            current = None
        if current is not None and self._is_beside(current, latents, value, arguments):
            return self.call_beside(_ANOTHER_PROMPT, latents, timestep, arguments)
        if current is None or not current.image.holds(latents, arguments):
            current = self._begin(latents, value, arguments, precision_of(timestep))
        try:
            with ordinary_tensors():
                return current.compute(latents, value, precision_of(timestep))
        except BaseException:
            self.reset()  # a step may have begun that was never computed
            raise

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
        step = self.record if self.record and value == self.record.timestep else None
        last = last_read(step.step, self._image.settings) if step and self._image else 0
        return self._branches[name].call(latents, value, arguments, skip_layers, step, self._expected(), last)

    def _is_beside(
        self, current: ImageInProgress, latents: Tensor, timestep: float, arguments: Mapping[str, Tensor]
    ) -> bool:
        """Whether a call is the other one of true guidance, in a pipeline that does not say so by a `cache_context`.

        Such pipelines (FLUX's, but for text-to-image) call the model with the prompt, then with the negative one.
        """
        return (
            not self.session.engine.family.batched_guidance
            and timestep == current.timestep
            and current.image.is_for(latents)
            and not current.image.holds(latents, arguments)
        )

    def _expected(self) -> list[float]:
        """The timesteps that will come: the schedule's, or where the pipeline hides it, those of the last image."""
        return self._timesteps.schedule or self._past

    def _begin(
        self, latents: Tensor, timestep: float, arguments: Mapping[str, Tensor], precision: float
    ) -> ImageInProgress:
        settings, table = self.settings, self.settings.schedule
        if table is not None and table.timesteps is not None:
            table.check_timesteps(self._timesteps.schedule, precision)
            if table.number_at(timestep, precision) > 0:
                settings = begun_late(settings)
        if self._image is not None:
            self._past = self._image.timesteps
        self.reset()
        image = Image(self.session, latents, arguments)
        selector = self._selector_for(image, settings)
        dims = dataclasses.replace(image.dims, num_kept=selector.num_kept if selector else 0)
        self.session.begin(dims, image.conditioning, self._expected())
        self._image = ImageInProgress(image, self.session, settings, selector)
        return self._image

    def _selector_for(self, image: Image, settings: PruneSettings) -> Selector | None:
        """The last image's, whose captured steps can be replayed, if it was for images like this one."""
        engine = self.session.engine
        if not settings.num_kept(int(image.dims.num_tokens)):
            return None
        needed = (settings, image.dims, engine.device, engine.dtype)
        if needed not in self._selectors:
            self._selectors.clear()
            shape = [int(size) for size in engine.family.noise_shape(image.dims)]
            noise = torch.empty(shape, dtype=engine.dtype, device=engine.device)
            with ordinary_tensors():
                selector = SELECTORS[settings.policy](engine.family, settings, image.grid, noise)
            self._selectors[needed] = selector
        self._selectors[needed].reset()
        return self._selectors[needed]
