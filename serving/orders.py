"""What one request asked for, as it waits and is computed, and what it is told meanwhile."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cat_pruning.serving.run import Asked

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from cat_pruning.serving.failures import RequestError
    from cat_pruning.serving.model import Job
    from cat_pruning.serving.requests import ImageRequest

_RANDOM_SEEDS: Final = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A step of an image was computed; `step` counts from 1."""

    index: int
    step: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What an image will look like as far as is known after a step. `number` counts an image's previews from 0."""

    index: int
    number: int
    step: int
    num_steps: int
    image: Image.Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What is the same for the images of a request that were computed together. Times in ms."""

    queue_ms: float
    encode_ms: float
    steps_ms: float
    decode_ms: float
    steps: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """An image is there.

    Attributes:
        index: of the image in its request.
        counts: (N,) int64, how often each token was computed; grid: tokens (high, wide).
    """

    index: int
    image: Image.Image
    seed: int
    batch: Batch
    counts: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """No more images of this request will come."""

    error: RequestError


Event = Progress | Preview | Done | Failed


@dataclass(eq=False, slots=True)
class Picture:
    """One image of an order. See `cat_pruning.serving.queue.Waiting`."""

    order: Order
    index: int
    asked: Asked
    since: float = field(default_factory=time.monotonic)

    @property
    def kind(self) -> Job:
        """What the images of one batch have in common."""
        return self.order.job

    @property
    def share(self) -> tuple[str, int, int]:
        """Whose turn it is."""
        return self.order.job.share

    @property
    def most(self) -> int:
        """Images of a batch."""
        return self.order.job.most


class Order:
    """The images of one request, and its events. Made on the event loop's thread; told things from any.

    Args:
        request: what is asked for.
        job: what that means for its model.
        request_id: for the log and the answer.

    Attributes:
        is_cancelled: nobody waits for it any more.
    """

    def __init__(self, request: ImageRequest, job: Job, request_id: str) -> None:
        self.job, self.request_id = job, request_id
        self.num_previews = request.partial_images or 0
        self.began = time.monotonic()
        self.is_cancelled = False
        self._loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        first = secrets.randbelow(_RANDOM_SEEDS) if request.seed is None else request.seed
        negative = request.negative_prompt or ""
        self.pictures = [
            Picture(self, index, Asked(prompt=prompt, negative_prompt=negative, seed=(first + index) % 2**63))
            for index, prompt in enumerate(request.prompts)
        ]

    def preview_after(self, number: int) -> int | None:
        """Which preview is due after a step, 0-based; the previews divide the steps evenly, the image is the last."""
        due = [(each + 1) * self.job.steps // (self.num_previews + 1) for each in range(self.num_previews)]
        return due.index(number + 1) if number + 1 in due else None

    def tell(self, event: Event) -> None:
        """Add an event, from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
