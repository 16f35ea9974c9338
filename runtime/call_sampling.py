"""The images that calls of a transformer make one after another, and what each call computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cat_pruning.runtime.calls import Call
from cat_pruning.runtime.record import CallRecord
from cat_pruning.runtime.streams import CallsOfImage
from cat_pruning.runtime.timesteps import TimestepReader
from cat_pruning.schedule import StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.timeline import last_read, scheduled_step


class CallSampling:
    """The images of one thread.

    A new image begins when the pipeline sets a new schedule, when the timestep turns back, and with the first call at
    a noise level that goes on from no call before, by its shapes, its arguments or its prompt: see `streams`. So an
    image that was broken off leaves no trace in the next one.

    Attributes:
        record: of the last call of the image in progress; None before the first.
    """

    def __init__(self) -> None:
        self._timesteps = TimestepReader()
        self._settings: PruneSettings | None = None
        self._direction = 0.0  # of the timesteps of past images
        self._image: CallsOfImage | None = None
        self.record: CallRecord | None = None

    def reset(self) -> None:
        """Forget the image in progress."""
        if self._image is not None:
            self._direction = self._image.direction
        self._image, self.record = None, None

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
        timestep, is_new_schedule = self._timesteps.read(call.timestep)
        image = None if is_new_schedule else self._image
        stream = image.stream_of(call, timestep) if image is not None else None
        try:
            if image is None or stream is None:
                image = self._begin(call.precision)
                stream = image.begin(call, timestep)
            number = self._number(image, call.precision)
            row = stream.row(scheduled_step(number, image.timesteps, settings))
            self.record = CallRecord(step=number, row=row, timestep=timestep)
            if row.kind is StepKind.FORECAST:
                return stream.forecast(row)
            output = full()
            stream.keep(number, output, last_read(number, settings))
            return output
        except BaseException:
            self.reset()
            raise

    def _begin(self, precision: float) -> CallsOfImage:
        assert self._settings is not None
        self.reset()
        expected = self._timesteps.schedule
        if self._settings.schedule is not None:
            self._settings.schedule.check_timesteps(expected, precision)
        self._image = CallsOfImage(expected[-1] - expected[0] if expected else self._direction)
        return self._image

    def _number(self, image: CallsOfImage, precision: float) -> int:
        assert self._settings is not None
        table = self._settings.schedule
        if table is not None and table.timesteps is not None:
            return table.number_at(image.timesteps[-1], precision)
        return len(image.timesteps) - 1
