"""What the measurements of cat-serve share: a server in this process, and a pipeline that nothing is served by."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import torch
import uvicorn

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.families import family_named
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.serving.app import make_app
from cat_pruning.serving.config import ServeConfig
from cat_pruning.serving.server import Server, listen
from cat_pruning.serving.service import Service
from cat_pruning.settings import PruneSettings

URL: Final = "/v1/images/generations"
PROMPTS: Final = (
    "a large red circle above a small blue star on a plain black background",
    "a small green triangle left of a large white square on a plain blue background",
    "a large yellow cross below a small purple circle on a plain white background",
)


@dataclass(frozen=True)
class Running:
    """A server that runs."""

    url: str
    service: Service

    def client(self) -> httpx.Client:
        """A client of its own connections."""
        return httpx.Client(base_url=self.url, timeout=600)


@contextmanager
def running(bundle: Path, **options: Any) -> Iterator[Running]:
    """Serve a bundle meanwhile, on a free port of loopback; the keywords are those of `ServeConfig`."""
    service = Service(ServeConfig(bundles=(bundle,), **options))
    listening = listen("127.0.0.1", 0)
    server = Server(uvicorn.Config(make_app(service), log_config=None, lifespan="off", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    service.start()
    asyncio.run(service.ready())
    try:
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", service)
    finally:
        service.close()
        server.should_exit = True
        thread.join()


class Direct:
    """The bundle's pipeline, called as the documents say."""

    def __init__(self, bundle: Path) -> None:
        manifest = Bundle.open(bundle).manifest
        self.pipe = load_pipeline(bundle)
        self.pipe.set_progress_bar_config(disable=True)
        family = family_named(manifest.family, manifest.transformer_config)
        self._text = family.pipeline_arguments(self.pipe, manifest.geometry.text_length)

    def __call__(
        self, prompts: list[str], seeds: list[int], settings: PruneSettings, size: tuple[int, int], steps: int
    ) -> list[Any]:
        """Images of one batch, at guidance 3; `size` is (height, width)."""
        self.pipe.transformer.settings = settings
        images: list[Any] = self.pipe(
            prompts,
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **self._text,
        ).images
        return images
