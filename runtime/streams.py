"""An image of which nothing is known but the calls that are made for it, told apart by their arguments.

A pipeline calls its transformer once at a noise level, or several times: with the prompt and without it, for guidance.
Each of these calls goes on from the one at the level before that has the same part in the image; together they are a
*stream*, which has outputs of its own. A call is of the stream

1. that has its form, and most of its conditioning tensors by their memory: as many as were found alike before, and all
   of them if the stream was called at this level already;
2. else, of those of its form that were called at the level before but not yet at this one, the first; only while their
   conditioning never came in the same memory twice, and if they were called with the same latents.

A call that is of no stream begins one of its own; if it is the first at its level, it begins another image. Schedulers
of second order call twice at a level, with other latents: rule 1 makes both calls of one stream, whose step they
compute again. Whatever happens, a stream reads no outputs but its own, and a step whose row reads outputs that it has
not computed is full.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from cat_pruning.runtime.calls import Call
from cat_pruning.runtime.image import Memory
from cat_pruning.runtime.outputs import History, mapped
from cat_pruning.schedule import FULL_STEP, ScheduledStep, StepKind


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
        self._alike = 0  # conditioning tensors that were the same memory in a later call
        self.follow(call, level)

    def follow(self, call: Call, level: int, alike: int = 0) -> None:
        """Take a call as the last one. `alike`: how many of its conditioning tensors are those of the call before."""
        self.level, self._alike = level, max(self._alike, alike)
        self._latents = Memory(call.latents)
        self._memory = [Memory(tensor) for tensor in call.conditioning]

    def num_alike(self, call: Call) -> int:
        """How many of its conditioning tensors are those of this stream's last call."""
        return sum(memory.holds(tensor) for memory, tensor in zip(self._memory, call.conditioning, strict=True))

    def num_needed(self, level: int) -> int:
        """How many have to be for a call to be of this stream."""
        return max(1, len(self._memory) if level == self.level else self._alike)

    def may_be_next(self, level: int) -> bool:
        """Whether it may go on at a level with conditioning in other memory."""
        return self.level == level - 1 and not self._alike

    def has_latents_of(self, other: Stream) -> bool:
        """Whether both were last called with the same latents."""
        return self._latents.holds(other._latents.tensor)

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
        direction: of a sign that a step from one timestep to the next has too; 0: not known.

    Attributes:
        timesteps: of its levels so far.
    """

    def __init__(self, direction: float) -> None:
        self.timesteps: list[float] = []
        self._direction = _sign(direction)
        self._streams: list[Stream] = []

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
        stream, alike = self._known(call, level)
        if stream is not None:
            stream.follow(call, level, alike)
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

    def _known(self, call: Call, level: int) -> tuple[Stream | None, int]:
        """By the two rules above; and how many conditioning tensors are alike."""
        best: Stream | None = None
        most = 0
        formed_alike = [stream for stream in self._streams if stream.form == call.form]
        for stream in formed_alike:
            alike = stream.num_alike(call)
            if alike > most and alike >= stream.num_needed(level):
                best, most = stream, alike
        if best is not None:
            return best, most
        waiting = [stream for stream in formed_alike if stream.may_be_next(level)]
        if waiting and all(stream.has_latents_of(waiting[0]) for stream in waiting):
            return waiting[0], 0
        return None, 0


def _sign(value: float) -> float:
    return math.copysign(1.0, value) if value else 0.0
