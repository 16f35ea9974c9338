"""The images that the calls of one thread make, one after another or in turn: which image each call is of."""

from __future__ import annotations

import logging
from typing import Final

from torch import Tensor

from cat_pruning.engines.session_pool import SessionPool
from cat_pruning.runtime.image_in_progress import ImageInProgress
from cat_pruning.runtime.record import StepRecord
from cat_pruning.runtime.step_call import StepCall
from cat_pruning.runtime.timesteps import NoiseLevel, TimestepReader
from cat_pruning.settings import PruneSettings

logger = logging.getLogger(__name__)

_ANOTHER_PROMPT: Final = "another prompt"  # the side branch of calls that no context names
_MOST_IMAGES: Final = 4  # in progress on one thread
_LATE: Final = 0.95  # of the first timestep of a family; solvers begin text to image at 999 of 1000 at the lowest
_MOST_SHORT: Final = 3  # images of one step, one after another, until it is said


class Sampling:
    """The images of one thread, told apart by the calls that its pipelines make.

    A call goes on with an image in progress if it is in the same schedule, at the same timestep or a lower one, with
    latents of the same shape and the same conditioning: tensors in the same memory, or of the same values. Fewer rows
    or more rows are the same image where guidance was switched off or on. Any other call begins an image. So an image
    that was broken off leaves no trace in the next one, and one that a callback makes amid another leaves none in that.

    Two calls at the first timestep of an image, with the same conditioning and other latents, may be two images that
    are stepped in turn, which nothing tells apart afterwards. All of their steps are full, and a warning says so.

    Calls on the side of the image, as for skip-layer guidance, are no steps: see `SideBranch`.

    Args:
        pool: lends sessions.
        settings: of images that begin.
    """

    def __init__(self, pool: SessionPool, settings: PruneSettings) -> None:
        self._pool = pool
        self.settings = settings
        self._timesteps = TimestepReader()
        self._images: list[ImageInProgress] = []  # the last one that was called first
        self._past: list[float] = []  # the timesteps of the image before
        self._num_short = 0  # images of one step, one after another
        self._said: set[str] = set()

    @property
    def image(self) -> ImageInProgress | None:
        """That the last call was of."""
        return self._images[0] if self._images else None

    @property
    def record(self) -> StepRecord | None:
        """What the last step of the image in progress computed."""
        return self._images[0].record if self._images else None

    def reset(self) -> None:
        """Forget the images in progress."""
        while self._images:
            self._images.pop().close()

    def call(self, call: StepCall) -> Tensor:
        """Compute one call of the transformer.

        Returns:
            The noise prediction, in the engine's dtype and the transformer's layout.

        Once per image the clusters are found and the timesteps are read, which synchronises with a GPU when they
        are on it; nothing else here does, unless a pipeline passes timesteps that are no view of a schedule (FLUX), or
        conditioning that it makes anew on every step: see `Image.difference`.
        """
        level = self._timesteps.read(call.timestep)
        image = self._image_of(call, level)
        if image is None and (image := self._image_beside(call, level)) is not None:
            return image.call_beside(_ANOTHER_PROMPT, call, level, self._expected(level))
        if image is None:
            image = self._begin(call, level)
        elif _is_ambiguous(image, call, level):
            image = self._begin_ambiguous(image)
        try:
            return image.call(call, level, self._expected(level), is_known=True)
        except BaseException:
            self._images.remove(image)
            raise

    def call_beside(self, name: str, call: StepCall) -> Tensor:
        """Compute a call that is no step of the image itself, but goes with one: see `SideBranch`."""
        level = self._timesteps.read(call.timestep)
        if not self._images or self._images[0].has_other_schedule(level):
            self._add(ImageInProgress(self._pool, self.settings))
        return self._images[0].call_beside(name, call, level, self._expected(level))

    def _image_of(self, call: StepCall, level: NoiseLevel) -> ImageInProgress | None:
        """The image in progress that a call goes on with."""
        of_it = (image for image in self._images if image.difference(call, level) is None)
        return self._first(next(of_it, None))

    def _image_beside(self, call: StepCall, level: NoiseLevel) -> ImageInProgress | None:
        """The image in progress that a call goes with, though no context says so."""
        beside = (image for image in self._images if image.is_beside(call, level, _ANOTHER_PROMPT))
        return self._first(next(beside, None))

    def _first(self, image: ImageInProgress | None) -> ImageInProgress | None:
        if image is not None:
            self._images.remove(image)
            self._images.insert(0, image)
        return image

    def _begin(self, call: StepCall, level: NoiseLevel) -> ImageInProgress:
        self._look_at_last(call, level)
        ends = self._past[-1:]
        if self._images:
            self._past = self._images[0].timesteps
            ends += self._past[-1:] if len(self._images) > 1 else []
        self._look_at_schedule(level)
        for image in list(self._images):
            is_replaced = not image.has_other_schedule(level) and image.has_conditioning(call, level)
            # Where a pipeline hides its schedule, images end at the timestep that others ended at.
            is_at_end = image.has_no_schedule and image.timestep in ends
            if is_replaced or is_at_end or image.is_over:
                self._images.remove(image)
                image.close()
        return self._add(ImageInProgress(self._pool, self.settings))

    def _begin_ambiguous(self, former: ImageInProgress) -> ImageInProgress:
        """An image in the place of one that it cannot be told from."""
        self._say_once(
            "ambiguous",
            "two calls at an image's first timestep have the same conditioning and other latents: every step is "
            "computed in full, because images that are stepped in turn cannot be told apart; "
            "step each by its own `transformer.image()`",
        )
        self._images.remove(former)
        former.close()
        return self._add(ImageInProgress(self._pool, self.settings, computes_all=True))

    def _add(self, image: ImageInProgress) -> ImageInProgress:
        self._images.insert(0, image)
        while len(self._images) > _MOST_IMAGES:
            self._images.pop().close()
        return image

    def _expected(self, level: NoiseLevel) -> list[float]:
        """The timesteps that will come: the schedule's, or where the pipeline hides it, those of the last image."""
        return level.expected or self._past

    def _look_at_last(self, call: StepCall, level: NoiseLevel) -> None:
        """Say it when one image after another has a single step, so that nothing is ever pruned."""
        last = self.image
        difference = last.difference(call, level) if last else None
        is_short = last is not None and len(last.timesteps) == 1 and last.timestep != level.timestep
        self._num_short = self._num_short + 1 if is_short else 0
        if self._num_short >= _MOST_SHORT and self._computes_less:
            self._say_once(
                "short",
                f"every call begins a new image, and so every step is computed in full: {difference}; pass the same "
                "tensors on every step of an image, or step it by `transformer.image()`",
            )

    def _look_at_schedule(self, level: NoiseLevel) -> None:
        """Say it when an image begins so late that none of its steps is pruned: image to image at a low strength."""
        begins_late = level.timestep < _LATE * self._pool.engine.family.max_timestep
        steps = len({timestep for timestep in self._expected(level) if timestep <= level.timestep})
        is_short = 1 < steps <= self.settings.full_steps
        if begins_late and is_short and self.settings.schedule is None and self._computes_less:
            self._say_once(
                "unpruned",
                f"none of an image's {steps} steps is pruned: the first {self.settings.full_steps} of every image are "
                "full; give more steps, a higher strength, or settings with fewer full_steps",
            )

    @property
    def _computes_less(self) -> bool:
        return self.settings.schedule is not None or self.settings.keep_ratio < 1.0

    def _say_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s", message)


def _is_ambiguous(image: ImageInProgress, call: StepCall, level: NoiseLevel) -> bool:
    """Whether a call at an image's first timestep may as well be another image's: see `Sampling`."""
    is_at_first_level = len(image.timesteps) == 1 and level.timestep == image.timestep
    return is_at_first_level and not image.is_repeated(call)
