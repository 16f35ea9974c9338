"""The images that calls of a transformer make one after another, and what each call computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from cat_pruning.runtime.calls import Call
from cat_pruning.runtime.record import CallRecord
from cat_pruning.runtime.streams import CallsOfImage, Stream
from cat_pruning.runtime.timesteps import NoiseLevel, TimestepReader
from cat_pruning.schedule import StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.timeline import at_timesteps, last_read, scheduled_step

_MOST_IMAGES: Final = 2  # in progress on one thread: one, and another in a callback


class CallSampling:
    """The images of one thread.

    A new image begins when the pipeline sets a new schedule, when the timestep turns back, and with the first call at
    a noise level that goes on from no call before, by its shapes, its arguments or its prompt: see `streams`. So an
    image that was broken off leaves no trace in the next one, and an image amid another none in that.

    Attributes:
        record: of the last call; None before the first.
    """

    def __init__(self) -> None:
        self._timesteps = TimestepReader()
        self._settings: PruneSettings | None = None
        self._direction = 0.0  # of the timesteps of past images
        self._images: list[CallsOfImage] = []  # the last one that was called first
        self.record: CallRecord | None = None

    def reset(self) -> None:
        """Forget the images in progress."""
        for image in self._images[:1]:
            self._direction = image.direction
        self._images, self.record = [], None

    def compute(self, call: Call, settings: PruneSettings, full: Callable[[], Any]) -> Any:
        """The output of one call. Synchronises with a GPU where `TimestepReader.read` does.

        Args:
            call: what it says.
            settings: what to compute on which step.
            full: computes it, and returns the transformer's output, a tensor or a structure of tensors.

        Returns:
            What `full` returns, or a structure like its earlier ones, of new tensors.

        Raises:
            ScheduleError: the schedule has no row for the call.
        """
        if settings is not self._settings and settings != self._settings:
            self.reset()
        self._settings = settings
        level = self._timesteps.read(call.timestep)
        image, stream = self._known(call, level) or self._begin(call, level)
        try:
            number = self._number(image, call.precision)
            row = stream.row(scheduled_step(number, image.timesteps, image.settings))
            self.record = CallRecord(step=number, row=row, timestep=level.timestep)
            if row.kind is StepKind.FORECAST:
                return stream.forecast(row)
            output = full()
            stream.keep(number, output, last_read(number, image.settings))
            return output
        except BaseException:
            self._images.remove(image)
            self.record = None
            raise

    def _known(self, call: Call, level: NoiseLevel) -> tuple[CallsOfImage, Stream] | None:
        """The image and the stream that a call goes on with, the first one from now on."""
        for image in self._images:
            is_other = None not in (level.schedule, image.level.schedule) and level.schedule is not image.level.schedule
            stream = None if is_other else image.stream_of(call, level.timestep)
            if stream is not None:
                image.level = level
                self._images.remove(image)
                self._images.insert(0, image)
                return image, stream
        return None

    def _begin(self, call: Call, level: NoiseLevel) -> tuple[CallsOfImage, Stream]:
        assert self._settings is not None
        for image in self._images[:1]:
            self._direction = image.direction
        expected = level.expected
        settings = at_timesteps(self._settings, expected, call.precision)
        image = CallsOfImage(level, settings, expected[-1] - expected[0] if expected else self._direction)
        self._images = [image, *(before for before in self._images if not before.is_over)][:_MOST_IMAGES]
        return image, image.begin(call, level.timestep)

    def _number(self, image: CallsOfImage, precision: float) -> int:
        table = image.settings.schedule
        if table is not None and table.timesteps is not None:
            return table.number_at(image.timesteps[-1], precision)
        return len(image.timesteps) - 1
