"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

if TYPE_CHECKING:
    from cat_pruning.serving.model import ServedModel

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_IMAGES: Final = (1, 2, 4, 8, 16, 32)
OUTCOMES: Final = ("done", "refused", "busy", "unavailable", "timeout", "cancelled", "failed")


class Metrics:
    """The server's counters, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("cat_requests", "Requests for images, by outcome.", ["outcome"], registry=registry)
        self.images = Counter("cat_images", "Images computed.", ["model"], registry=registry)
        self.steps = Counter("cat_steps", "Steps of images, by kind.", ["kind"], registry=registry)
        self.queue_seconds = Histogram(
            "cat_queue_seconds", "How long an image waited.", buckets=_SECONDS, registry=registry
        )
        self.stage_seconds = Histogram(
            "cat_stage_seconds", "Stages of a batch.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self.request_seconds = Histogram(
            "cat_request_seconds", "Requests that were answered with images.", buckets=_SECONDS, registry=registry
        )
        self.batch_images = Histogram("cat_batch_images", "Images of a batch.", buckets=_IMAGES, registry=registry)
        self.queue_length = Gauge("cat_queue_length", "Images that wait.", registry=registry)
        self._sessions = Gauge("cat_sessions", "Sessions, idle ones included.", ["model"], registry=registry)
        self._lent = Gauge("cat_sessions_lent", "Sessions of images in progress.", ["model"], registry=registry)
        self._session_bytes = Gauge("cat_session_bytes", "Memory of the sessions.", ["model"], registry=registry)
        self._gpu = Gauge("cat_gpu_memory_bytes", "Memory that torch holds on the GPU.", ["model"], registry=registry)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)

    def text(self, models: Iterable[ServedModel], waiting: int) -> bytes:
        """All of it, in Prometheus' format."""
        self.queue_length.set(waiting)
        for model in models:
            sessions, device = model.transformer.sessions, model.transformer.device
            self._sessions.labels(model.name).set(sessions.num_sessions)
            self._lent.labels(model.name).set(sessions.num_lent)
            self._session_bytes.labels(model.name).set(sessions.num_bytes)
            if device.type == "cuda":
                import torch

                self._gpu.labels(model.name).set(torch.cuda.memory_reserved(device))
        return generate_latest(self.registry)
