"""A server of sd3-mini on loopback, in this process: its model is loaded once, other servers of a test share it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from serving_server import Server

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.schedules import write_schedules
from cat_pruning.schedule import Schedule
from cat_pruning.serving import server as process
from cat_pruning.serving.app import make_app
from cat_pruning.serving.config import ServeConfig
from cat_pruning.serving.model import ServedModel
from cat_pruning.serving.service import Service, State


@pytest.fixture(scope="session")
def served_bundle(mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd3-mini with a schedule of six steps, three of them full."""
    copied = tmp_path_factory.mktemp("served") / "sd3-mini"
    bundle = Bundle.open(shutil.copytree(mini_bundle, copied, copy_function=os.link))
    schedule = Schedule.of(6, {0, 1, 3}, {2: {0: -1.0, 1: 2.0}, 4: {3: 1.0}, 5: {3: 1.0}})
    return write_schedules(bundle.path, [schedule]).path


@pytest.fixture(scope="session")
def loaded(served_bundle: Path) -> ServedModel:
    """The model, loaded and warm."""
    config = ServeConfig(bundles=(served_bundle,), engine="onnxruntime")
    model = ServedModel.load("sd3-mini", served_bundle, config)
    model.warm_up()
    return model


class _Warm(ServedModel):
    def warm_up(self) -> None:
        """It is."""


@pytest.fixture(scope="session")
def serve(loaded: ServedModel, served_bundle: Path) -> Callable[..., Any]:
    """Runs a server meanwhile: `with serve(queue=2) as server:`; keywords are those of `ServeConfig`."""

    @contextmanager
    def run(**options: Any) -> Iterator[Server]:
        config = ServeConfig(bundles=(served_bundle,), **options)

        def load(name: str, path: Path, config: ServeConfig) -> ServedModel:
            return _Warm(name, loaded._pipe, loaded._manifest, loaded._schedules, config)

        service = Service(config, load)
        listening = process.listen("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = process.Server(
            uvicorn.Config(make_app(service), log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        service.start()
        while service.state is State.STARTING:  # no event loop: a browser's may run on this thread
            time.sleep(0.001)
        headers = {"Authorization": f"Bearer {config.api_key}".encode()} if config.api_key else {}
        try:
            with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
                yield Server(url, service, client)
        finally:
            assert service.close()
            server.should_exit = True
            thread.join()
            listening.close()

    return run


@pytest.fixture(scope="session")
def server(serve: Callable[..., Any]) -> Iterator[Server]:
    """A server with the defaults, for tests that leave it as it was."""
    with serve() as running:
        yield running
