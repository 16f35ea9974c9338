"""The server without HTTP: models, their queue, the thread that computes, and what requests are told."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from enum import StrEnum
from http import HTTPStatus
from typing import Final

from cat_pruning.errors import CatError
from cat_pruning.serving.config import ServeConfig
from cat_pruning.serving.failures import RequestError, busy, failed, too_late, unavailable
from cat_pruning.serving.metrics import Metrics
from cat_pruning.serving.model import Job, ServedModel
from cat_pruning.serving.orders import Batch, Done, Event, Failed, Order, Picture, Preview, Progress
from cat_pruning.serving.queue import BatchQueue, FullQueueError
from cat_pruning.serving.requests import ImageRequest
from cat_pruning.serving.run import Computed, Step

logger = logging.getLogger(__name__)

_WARM_UP_S: Final = 5  # when to ask again while the models are loaded
_FIRST_GUESS_S: Final = 1.0  # of an image, before there was one
_MOST_FAILED: Final = 5  # batches, one after another, before the service says that it cannot go on


class State(StrEnum):
    """What the service is about."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class _GivenUpError(Exception):
    """Nobody waits for any image of the batch."""


class Service:
    """Bundles that are served, one batch at a time.

        service = Service(config)
        service.start()
        await service.ready()
        events = service.events(service.submit(request, "id"))

    Args:
        config: what to serve, and how.
        load: makes a model of its name and its bundle.

    Attributes:
        state: what it is about.
        metrics: what Prometheus is told.
        models: by their names, once they are loaded.
    """

    def __init__(self, config: ServeConfig, load: Callable[..., ServedModel] = ServedModel.load) -> None:
        self.config, self._load = config, load
        self.state, self.metrics = State.STARTING, Metrics()
        self.models: dict[str, ServedModel] = {}
        self._queue: BatchQueue[Picture] = BatchQueue(config.queue, config.max_wait_ms / 1e3)
        self._thread = threading.Thread(target=self._work, name="cat-serve-compute", daemon=True)
        self._is_loaded = threading.Event()
        self._error: Exception | None = None
        self._orders: set[Order] = set()
        self._image_seconds = _FIRST_GUESS_S  # of late
        self._failed = 0  # batches, one after another

    def start(self) -> None:
        """Load the bundles and warm them up, on the thread that will compute."""
        self._thread.start()

    async def ready(self) -> None:
        """Wait until all models are warm. Raises what their loading raises."""
        await asyncio.to_thread(self._is_loaded.wait)
        if self._error is not None:
            raise self._error

    def submit(self, request: ImageRequest, request_id: str) -> Order:
        """Take a request's images into the queue; called on an event loop.

        Raises:
            RequestError: it is refused, the queue is full, or the service is not ready.
        """
        try:
            order = Order(request, self._checked(request), request_id)
            self._enqueue(order)
        except RequestError as error:
            self.metrics.requests.labels(error.outcome).inc()
            raise
        self._orders.add(order)
        return order

    async def events(self, order: Order) -> AsyncIterator[Event]:
        """What becomes of an order, until its last image. A caller that leaves early cancels it.

        Raises:
            RequestError: it failed, or its time is over.
        """
        left, outcome, ends = len(order.pictures), "cancelled", order.began + self.config.timeout_s
        try:
            while left:
                event = await asyncio.wait_for(order.events.get(), ends - time.monotonic())
                if isinstance(event, Failed):
                    raise event.error
                left -= isinstance(event, Done)
                outcome = outcome if left else "done"
                yield event
        except TimeoutError:
            outcome = "timeout"
            raise too_late(self.config.timeout_s) from None
        except RequestError as error:
            outcome = error.outcome
            raise
        finally:
            self.end(order, outcome)

    async def generate(self, request: ImageRequest, request_id: str) -> list[Done]:
        """All images of a request, in order. Raises as `submit` and `events` do."""
        events = self.events(self.submit(request, request_id))
        done = [event async for event in events if isinstance(event, Done)]
        return sorted(done, key=lambda each: each.index)

    @property
    def is_live(self) -> bool:
        """Whether another process would not do better."""
        is_over = self.state in (State.READY, State.DRAINING) and not self._thread.is_alive()
        return not is_over and self._failed < _MOST_FAILED

    def drain(self) -> None:
        """Take no more requests; those that are there go on."""
        if self.state in (State.STARTING, State.READY):
            self.state = State.DRAINING

    @property
    def num_orders(self) -> int:
        """Requests that wait or are computed."""
        return len(self._orders)

    def give_up(self, error: RequestError) -> None:
        """Tell all requests that they will get no images; the step in progress ends."""
        for order in list(self._orders):
            order.is_cancelled = True
            order.tell(Failed(error=error))

    def close(self, wait_s: float = 10.0) -> bool:
        """Stop: the step in progress ends, what waits is dropped. Returns whether the thread has ended in time."""
        self.state = State.STOPPED
        self.give_up(unavailable("the server stops", _WARM_UP_S))
        self._queue.close()
        if self._thread.ident is not None:
            self._thread.join(wait_s)
        return not self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Images that wait."""
        return len(self._queue)

    def _checked(self, request: ImageRequest) -> Job:
        if self.state is not State.READY:
            raise unavailable(f"the server is {self.state}", _WARM_UP_S)
        name = request.model or next(iter(self.models))
        model = self.models.get(name)
        if model is None:
            known = ", ".join(self.models)
            raise RequestError(
                HTTPStatus.NOT_FOUND, "model_not_found", f"there is no such model; there are {known}", param="model"
            )
        return model.job(request)

    def _enqueue(self, order: Order) -> None:
        if len(order.pictures) > self.config.queue:
            raise RequestError(
                HTTPStatus.BAD_REQUEST,
                "too_many_images",
                f"these are {len(order.pictures)} images, and at most {self.config.queue} may wait",
                "ask for fewer at once",
                param="n",
            )
        try:
            self._queue.put(order.pictures)
        except FullQueueError:
            waiting = len(self._queue)
            raise busy(waiting, max(1, math.ceil(waiting * self._image_seconds))) from None

    def end(self, order: Order, outcome: str = "cancelled") -> None:
        """Say that nobody waits for an order any more. The second time nothing happens."""
        if order not in self._orders:
            return
        order.is_cancelled = True
        self._orders.discard(order)
        self._queue.remove(order.pictures)
        seconds = time.monotonic() - order.began
        self.metrics.requests.labels(outcome).inc()
        if outcome == "done":
            self.metrics.request_seconds.observe(seconds)
        logger.info(
            "images",
            extra={
                "request_id": order.request_id,
                "outcome": outcome,
                "model": order.job.model,
                "size": order.job.size,
                "images": len(order.pictures),
                "steps": order.job.steps,
                "recipe": order.job.recipe,
                "ms": round(seconds * 1e3, 1),
            },
        )

    def _work(self) -> None:
        try:
            for name, path in zip(self.config.names, self.config.bundles, strict=True):
                began = time.monotonic()
                model = self._load(name, path, self.config)
                model.warm_up()
                self.models[name] = model
                logger.info("model is warm", extra={"model": name, "ms": round((time.monotonic() - began) * 1e3)})
            if self.state is State.STARTING:
                self.state = State.READY
        except Exception as error:  # noqa: BLE001  # passed to who waits
            self._error, self.state = error, State.STOPPED
            return
        finally:
            self._is_loaded.set()
        while batch := self._queue.take():
            self._compute(batch)

    def _compute(self, batch: Sequence[Picture]) -> None:
        """Compute a batch and tell its requests. An error is theirs; the next batch is computed all the same."""
        job, began = batch[0].kind, time.monotonic()
        try:
            computed = self.models[job.model].compute(
                job, [each.asked for each in batch], lambda step: self._after_step(batch, step)
            )
            self._failed = 0
            self._tell(batch, computed, began)
        except _GivenUpError:
            pass
        except Exception as error:
            self._failed += 1
            ids = sorted({picture.order.request_id for picture in batch})
            said = error.problem if isinstance(error, CatError) else type(error).__name__
            logger.exception("a batch failed: %s", said, extra={"request_id": ids[0], "requests": ids})
            for picture in batch:
                picture.order.tell(Failed(error=failed(picture.order.request_id)))
        finally:
            self._queue.charge(job.share, time.monotonic() - began)

    def _after_step(self, batch: Sequence[Picture], step: Step) -> None:
        wanted = [(row, each) for row, each in enumerate(batch) if not each.order.is_cancelled]
        if not wanted:
            raise _GivenUpError
        for row, picture in wanted:
            order, at = picture.order, {"index": picture.index, "step": step.number + 1}
            order.tell(Progress(**at, num_steps=order.job.steps))
            number = order.preview_after(step.number)
            if number is not None:
                order.tell(Preview(**at, num_steps=order.job.steps, number=number, image=step.preview(row)))

    def _tell(self, batch: Sequence[Picture], computed: Computed, began: float) -> None:
        metrics, seconds = self.metrics, computed.seconds
        for stage, took in seconds.items():
            metrics.stage_seconds.labels(stage).observe(took)
        for kind, count in computed.kinds.items():
            metrics.steps.labels(str(kind)).inc(count * len(batch))
        metrics.batch_images.observe(len(batch))
        metrics.images.labels(batch[0].kind.model).inc(len(batch))
        took = (time.monotonic() - began) / len(batch)
        self._image_seconds += 0.2 * (took - self._image_seconds)
        for row, picture in enumerate(batch):
            metrics.queue_seconds.observe(began - picture.since)
            said = Batch(
                queue_ms=(began - picture.since) * 1e3,
                encode_ms=seconds["encode"] * 1e3,
                steps_ms=seconds["steps"] * 1e3,
                decode_ms=seconds["decode"] * 1e3,
                steps={str(kind): count for kind, count in computed.kinds.items()},
            )
            picture.order.tell(
                Done(
                    index=picture.index,
                    image=computed.images[row],
                    seed=picture.asked.seed,
                    batch=said,
                    counts=computed.counts[row],
                    grid=computed.grid,
                )
            )
