"""An image of which nothing is known but the calls that are made for it, told apart by their arguments.

A pipeline calls its transformer once at a noise level, or several times: with the prompt and without it, for guidance.
Each of these calls goes on from the one at the level before that has the same part in the image; together they are a
*stream*, which has outputs of its own. A call is of the stream

1. that has its form and the most of its conditioning tensors, in the memory that they were in at the call before: all
   of them, or as many as were found alike at the levels before;
2. else, if they were never found alike in their memory, by their values, which are read only then, and synchronise with
   a GPU; of a stream that was not called at a second level yet, some are enough, because others may change from level
   to level, as a control net's output;
3. else, where no tensors are alike, the only one of its form that was called at the level before and not at this one.

At the level where a stream was called already, it takes a call with all of its conditioning only.

A call that is of no stream begins one of its own; if it is the first at its level, it begins another image. Schedulers
of second order call twice at a level, with other latents: both calls are of one stream, whose step they compute again.
Whatever happens, a stream reads no outputs but its own, and a step whose row reads outputs that it has not computed is
full.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from cat_pruning.runtime.calls import Call
from cat_pruning.runtime.image import Memory
from cat_pruning.runtime.outputs import History, mapped
from cat_pruning.runtime.timesteps import NoiseLevel
from cat_pruning.schedule import FULL_STEP, ScheduledStep, StepKind
from cat_pruning.settings import PruneSettings


class Stream:
    """The calls that have one part in an image, and their outputs.

    Attributes:
        form: of its calls.
        level: number of the last noise level that it was called at.
    """

    def __init__(self, call: Call, level: int) -> None:
        self.form = call.form
        self._history = History()
        self._last: Any = None  # what it computed last
        self._alike = 0  # conditioning tensors that were alike in a later call
        self._stays = False  # in its memory, as far as is known
        self.level = level
        self.follow(call, level)

    def follow(self, call: Call, level: int, alike: int = 0, *, by_values: bool = False) -> None:
        """Take a call as the last one.

        Args:
            call: of this stream.
            level: the number of its noise level.
            alike: how many of its conditioning tensors are those of the call before.
            by_values: whether that was found by their values.
        """
        self._stays |= bool(alike) and not by_values
        self.level, self._alike = level, alike
        self._memory = [Memory(tensor) for tensor in call.conditioning]

    def num_alike(self, call: Call, *, by_values: bool) -> int:
        """How many of its conditioning tensors are those of this stream's last call."""
        if by_values and self._stays:
            return 0
        pairs = zip(self._memory, call.conditioning, strict=True)
        return sum(memory.equals(tensor) if by_values else memory.holds(tensor) for memory, tensor in pairs)

    def num_needed(self, level: int, *, by_values: bool) -> int:
        """How many have to be for a call to be of this stream."""
        if level != self.level and (self._alike or by_values):
            return max(1, self._alike)
        return max(1, len(self._memory))

    def may_be_next(self, level: int) -> bool:
        """Whether it may go on at a level with nothing alike."""
        return self.level == level - 1 and not self._alike

    def row(self, row: ScheduledStep) -> ScheduledStep:
        """A forecast if it can be made of this stream's outputs; else a full step."""
        is_possible = row.kind is StepKind.FORECAST and self._last is not None and self._history.has(row)
        return row if is_possible else FULL_STEP

    def keep(self, number: int, output: Any, last_read: float) -> None:
        """Remember a copy of what a step computed, because the pipeline may change it."""
        self._last = mapped(lambda tensor: tensor.detach().clone(), output)
        self._history.keep(number, self._last, last_read)

    def forecast(self, row: ScheduledStep) -> Any:
        """The output of a step that computes nothing: new tensors, in a structure like the computed ones'."""
        return self._history.combined(row.weights) if row.weights else mapped(Tensor.clone, self._last)


class CallsOfImage:
    """One image in progress: its noise levels and its streams.

    Args:
        level: of its first call.
        settings: what to compute on which step.
        direction: of a sign that a step from one timestep to the next has too; 0: not known.

    Attributes:
        level: of its last call.
        settings: as given.
        timesteps: of its levels so far.
    """

    def __init__(self, level: NoiseLevel, settings: PruneSettings, direction: float) -> None:
        self.level, self.settings = level, settings
        self.timesteps: list[float] = []
        self._direction = _sign(direction)
        self._streams: list[Stream] = []

    @property
    def is_over(self) -> bool:
        """Whether no call of it can come, as far as its schedule tells."""
        schedule = self.level.schedule
        return self.level.is_last or (schedule is not None and schedule.is_gone)

    @property
    def direction(self) -> float:
        """As it was given, or as three levels show."""
        return self._direction if len(self.timesteps) < 3 else _sign(self.timesteps[1] - self.timesteps[0])

    def stream_of(self, call: Call, timestep: float) -> Stream | None:
        """The stream of a call, which is its last one from now on; None: the call is of another image."""
        is_new_level = timestep != self.timesteps[-1]
        if is_new_level and self._turns_at(timestep):
            return None
        level = len(self.timesteps) - (0 if is_new_level else 1)
        stream = self._known(call, level)
        if stream is not None:
            if is_new_level:
                self.timesteps.append(timestep)
            return stream
        return None if is_new_level else self._begin_stream(call)

    def begin(self, call: Call, timestep: float) -> Stream:
        """The stream of the first call."""
        self.timesteps.append(timestep)
        return self._begin_stream(call)

    def _begin_stream(self, call: Call) -> Stream:
        self._streams.append(Stream(call, len(self.timesteps) - 1))
        return self._streams[-1]

    def _turns_at(self, timestep: float) -> bool:
        direction = _sign(timestep - self.timesteps[-1])
        expected = self._direction if len(self.timesteps) < 2 else _sign(self.timesteps[-1] - self.timesteps[-2])
        return bool(expected) and direction != expected

    def _known(self, call: Call, level: int) -> Stream | None:
        """By the three rules above."""
        formed_alike = [stream for stream in self._streams if stream.form == call.form]
        for by_values in (False, True):
            best: Stream | None = None
            most = 0
            for stream in formed_alike:
                alike = stream.num_alike(call, by_values=by_values)
                if alike > most and alike >= stream.num_needed(level, by_values=by_values):
                    best, most = stream, alike
            if best is not None:
                best.follow(call, level, most, by_values=by_values)
                return best
        waiting = [stream for stream in formed_alike if stream.may_be_next(level)]
        if len(waiting) != 1:
            return None
        waiting[0].follow(call, level)
        return waiting[0]


def _sign(value: float) -> float:
    return math.copysign(1.0, value) if value else 0.0
