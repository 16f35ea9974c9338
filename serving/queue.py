"""The images that wait: a bounded queue that hands out batches, the kinds of images in fair turn."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """An image that waits."""

    @property
    def kind(self) -> Hashable:
        """Images of one kind fit one batch."""

    @property
    def share(self) -> Hashable:
        """Images of one share, as of one size, are entitled to as much computing time as those of another."""

    @property
    def most(self) -> int:
        """Images that a batch of this kind may have."""

    @property
    def since(self) -> float:
        """When it came, in seconds on the clock of the queue."""


_Image = TypeVar("_Image", bound=Waiting)


class FullQueueError(Exception):
    """More images than the queue has room for."""


class BatchQueue(Generic[_Image]):
    """A bounded queue of images, taken in batches of one kind. Thread-safe.

    A batch is due when it has as many images as it may, or its oldest image has waited `max_wait_s`. Of those that are
    due the one goes next whose share has had least of the computing time (start-time fair queueing: Goyal, Vin, Cheng
    1996): many large images do not keep a small one waiting. A share that asked for nothing saves no time up. Within a
    share, first come, first served.

    Args:
        bound: most images that wait.
        max_wait_s: how long an image waits for others while a batch has room.
        clock: in seconds.
    """

    def __init__(self, bound: int, max_wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.bound, self.max_wait_s, self._clock = bound, max_wait_s, clock
        self._changed = threading.Condition()
        self._kinds: dict[Hashable, deque[_Image]] = {}
        self._used: dict[Hashable, float] = {}  # computing seconds that each share had, since nothing waited
        self._now = 0.0  # what the share had that was taken last: the least that a new share is said to have had
        self._is_closed = False

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._kinds.values()))

    def put(self, images: Collection[_Image]) -> None:
        """Add all images, or none.

        Raises:
            FullQueueError: there is no room for all of them.
        """
        with self._changed:
            if len(self) + len(images) > self.bound:
                raise FullQueueError
            for image in images:
                self._used[image.share] = max(self._used.get(image.share, 0.0), self._now)
                self._kinds.setdefault(image.kind, deque()).append(image)
            self._changed.notify_all()

    def remove(self, images: Collection[_Image]) -> None:
        """Take these images out, as far as they still wait."""
        gone = set(map(id, images))
        with self._changed:
            for kind, waiting in list(self._kinds.items()):
                self._keep(kind, deque(image for image in waiting if id(image) not in gone))

    def take(self) -> list[_Image]:
        """Wait for a batch that is due, and take it. Empty once the queue is closed."""
        with self._changed:
            while not self._is_closed:
                now = self._clock()
                due = [waiting for waiting in self._kinds.values() if self._due_at(waiting) <= now]
                if due:
                    return self._take(min(due, key=lambda waiting: (self._used[waiting[0].share], waiting[0].since)))
                soonest = min(map(self._due_at, self._kinds.values()), default=None)
                self._changed.wait(None if soonest is None else soonest - now)
            return []

    def charge(self, share: Hashable, seconds: float) -> None:
        """Say how long a batch was computed."""
        with self._changed:
            self._used[share] = max(self._used.get(share, 0.0), self._now) + seconds
            if not self._kinds:
                self._now = max(self._used.values())
                self._used.clear()

    def close(self) -> list[_Image]:
        """Hand out no more batches; returns what waited."""
        with self._changed:
            self._is_closed = True
            left = [image for waiting in self._kinds.values() for image in waiting]
            self._kinds.clear()
            self._changed.notify_all()
            return left

    def _due_at(self, waiting: deque[_Image]) -> float:
        first = waiting[0]
        return first.since if len(waiting) >= first.most else first.since + self.max_wait_s

    def _take(self, waiting: deque[_Image]) -> list[_Image]:
        first = waiting[0]
        self._now = max(self._now, self._used[first.share])
        batch = [waiting.popleft() for _ in range(min(len(waiting), first.most))]
        self._keep(first.kind, waiting)
        return batch

    def _keep(self, kind: Hashable, waiting: deque[_Image]) -> None:
        if waiting:
            self._kinds[kind] = waiting
        else:
            del self._kinds[kind]
