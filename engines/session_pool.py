"""The sessions of one engine, lent to images: as many as are in progress at once, and no more than a bound.

A session of SD3 at 1024x1024 holds 1.3 GB, one of FLUX 3.2 GB. So none belongs to a thread. An image takes one for its
first step and gives it back after its last; the next image, of whatever thread, has the same memory and the same
captured steps.

An image that a pipeline broke off never says so. Its session is taken away when another image needs one: at once where
the image is known to be over, else when there are `max_sessions`, from the image that was stepped longest ago.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from cat_pruning.engines.host_memory import give_back_freed_memory
from cat_pruning.engines.step_engine import StepEngine, StepSession
from cat_pruning.errors import EngineError, SettingsError
from cat_pruning.step_io import StepDims

logger = logging.getLogger(__name__)

MAX_SESSIONS: Final = 16


@dataclass(eq=False, slots=True)
class Place:
    """A session, and what goes with its memory from image to image.

    Attributes:
        kept: selectors by what they are for: captured steps are replayed with the very selector that they have.
    """

    session: StepSession
    kept: dict[object, Any] = field(default_factory=dict)


class Lease:
    """A session lent to one image. Used by one thread at a time; begins in use.

    Args:
        pool: it is of.
        place: what is lent.
        is_over: whether its image is known to be over. Asked by other threads; must not wait or synchronise.
        is_kept: whether it is never taken away, because its image says when it ends.
    """

    def __init__(self, pool: SessionPool, place: Place, is_over: Callable[[], bool], *, is_kept: bool) -> None:
        self._pool, self._place, self.is_kept = pool, place, is_kept
        self.is_over = is_over
        self.is_in_use = True
        self.is_lost = False  # the session was taken away or given back
        self._on_collection = weakref.finalize(self, pool._collected.append, place)
        self._on_collection.atexit = False

    @property
    def session(self) -> StepSession:
        """The session; of the image only between `resume` and `rest`."""
        return self._place.session

    @property
    def kept(self) -> dict[object, Any]:
        """See `Place`."""
        return self._place.kept

    def resume(self) -> bool:
        """Use the session again, until `rest`; False if the image has lost it."""
        with self._pool._changed:
            self.is_in_use = not self.is_lost
            if self.is_in_use:
                self._pool._used(self)
            return self.is_in_use

    def rest(self) -> None:
        """Between two steps: the session may be taken away."""
        with self._pool._changed:
            self.is_in_use = False
            self._pool._changed.notify_all()

    def give_back(self) -> None:
        """The image is over, or it needs no session any more."""
        with self._pool._changed:
            if not self.is_lost:
                self._pool._take_back(self)


class SessionPool:
    """The sessions of one engine. Thread-safe.

    Args:
        engine: makes them.
        max_sessions: at most so many at once, of images in progress and idle ones together.
        max_bytes: idle ones are freed, those that were used longest ago first, while all of them hold more; None: they
            are kept.

    Attributes:
        engine: as given.
    """

    def __init__(self, engine: StepEngine, max_sessions: int = MAX_SESSIONS, max_bytes: int | None = None) -> None:
        self.engine = engine
        self._changed = threading.Condition(threading.RLock())
        self._idle: list[Place] = []  # the last used one last
        self._lent: dict[Place, weakref.ref[Lease]] = {}  # in the order of their last use
        self._collected: deque[Place] = deque()  # whose images were collected; appended to at any moment
        self._has_said = False
        self.max_sessions = max_sessions
        self.max_bytes = max_bytes

    @property
    def max_sessions(self) -> int:
        """The bound; a smaller one holds from the next image on.

        Raises:
            SettingsError: where it is set, it is no positive number.
        """
        return self._max_sessions

    @max_sessions.setter
    def max_sessions(self, number: int) -> None:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise SettingsError(f"max_sessions={number!r}: expected a whole number from 1 on")
        self._max_sessions = number

    @property
    def max_bytes(self) -> int | None:
        """What idle ones are freed beyond; None: they are kept.

        Raises:
            SettingsError: where it is set, it is no number of bytes.
        """
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, number: int | None) -> None:
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
            raise SettingsError(f"max_bytes={number!r}: expected a whole number of bytes, or None")
        self._max_bytes = number

    @property
    def num_sessions(self) -> int:
        """Those that there are, in use or idle."""
        with self._changed:
            self._collect()
            return len(self._idle) + len(self._lent)

    @property
    def num_lent(self) -> int:
        """Of these, the ones that images in progress have."""
        with self._changed:
            self._collect()
            return len(self._lent)

    @property
    def num_bytes(self) -> int:
        """The memory that they hold."""
        with self._changed:
            self._collect()
            return sum(place.session.num_bytes for place in (*self._idle, *self._lent))

    def take(self, dims: StepDims, is_over: Callable[[], bool], *, is_kept: bool = False) -> Lease:
        """A session for an image that begins. Waits for a step of another thread if all sessions are in use.

        Args:
            dims: of the image; a session that has memory for it is preferred.
            is_over: see `Lease`.
            is_kept: see `Lease`.

        Raises:
            EngineError: all are lent to images that keep them.
        """
        with self._changed:
            place = self._free_place(dims)
            while place is None:
                leases = self._leases()
                if leases and all(lease.is_kept for lease in leases):
                    raise EngineError(
                        f"{len(leases)} sessions are in use by images that were begun with image(), and "
                        f"max_sessions={self._max_sessions}",
                        "close an image, or set transformer.sessions.max_sessions to more",
                    )
                self._changed.wait(timeout=1.0)  # or an image may be collected without a word
                place = self._free_place(dims)
            lease = Lease(self, place, is_over, is_kept=is_kept)
            self._used(lease)
            self._trim()
            return lease

    def release(self) -> None:
        """Free the memory of all sessions that no image needs any more."""
        with self._changed:
            self._collect()
            for lease in self._leases():
                if lease.is_over() and not lease.is_in_use:
                    self._take_back(lease)
            while self._idle:
                self._idle.pop().session.free()
        give_back_freed_memory()

    def _free_place(self, dims: StepDims) -> Place | None:
        """An idle place, one of an image that is over, a new one, or one that is taken away; None: all are in use."""
        self._collect()
        self._shrink()
        if not self._idle:
            resting = [lease for lease in self._leases() if not lease.is_in_use and not lease.is_kept]
            over = next((lease for lease in resting if lease.is_over()), None)
            if over is None and len(self._lent) < self._max_sessions:
                return Place(self.engine.session())
            if over is None and not resting:
                return None
            if over is None:
                self._say_that_it_is_taken()
            self._take_back(over or resting[0])
        place = next((idle for idle in reversed(self._idle) if idle.session.has_memory_for(dims)), self._idle[-1])
        self._idle.remove(place)
        return place

    def _shrink(self) -> None:
        """Free sessions above a bound that was set lower, but for those that are in use or kept."""
        while len(self._idle) + len(self._lent) > self._max_sessions:
            resting = [lease for lease in self._leases() if not lease.is_in_use and not lease.is_kept]
            if not self._idle and not resting:
                return
            if not self._idle:
                self._take_back(resting[0])
            self._idle.pop(0).session.free()

    def _say_that_it_is_taken(self) -> None:
        if not self._has_said:
            self._has_said = True
            logger.warning(
                "more images are in progress than max_sessions=%d: the memory of one goes to another, and its next "
                "step is computed in full; set transformer.sessions.max_sessions to more",
                self._max_sessions,
            )

    def _leases(self) -> list[Lease]:
        """Those whose images were not collected, the one that was used longest ago first."""
        return [lease for lease in (lent() for lent in self._lent.values()) if lease is not None]

    def _used(self, lease: Lease) -> None:
        self._lent.pop(lease._place, None)
        self._lent[lease._place] = weakref.ref(lease)

    def _take_back(self, lease: Lease) -> None:
        lease.is_lost, lease.is_in_use = True, False
        lease._on_collection.detach()
        self._return(lease._place)

    def _collect(self) -> None:
        while self._collected:
            self._return(self._collected.popleft())

    def _return(self, place: Place) -> None:
        del self._lent[place]
        place.session.reset()
        self._idle.append(place)
        self._trim()
        self._changed.notify_all()

    def _trim(self) -> None:
        if self.max_bytes is None:
            return
        held = sum(place.session.num_bytes for place in (*self._idle, *self._lent))
        while self._idle and held > self.max_bytes:
            place = self._idle.pop(0)
            held -= place.session.num_bytes
            place.session.free()
