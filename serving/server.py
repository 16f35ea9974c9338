"""The process: uvicorn around the app, from the first model loaded to the last request answered."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import uvicorn

from cat_pruning.errors import SettingsError
from cat_pruning.serving.app import make_app
from cat_pruning.serving.config import ServeConfig
from cat_pruning.serving.failures import unavailable
from cat_pruning.serving.logs import log_as_json
from cat_pruning.serving.service import Service

logger = logging.getLogger(__name__)

_LAST_WORDS_S: Final = 1.0  # of the grace, for telling requests that they are given up
_MOST_CONNECTIONS: Final = 512  # beside those of images that wait: each may hold a body
_POLL_S: Final = 0.05
_STALLED_MS: Final = 30_000  # for a client to take what was sent; then the system closes the connection


class Server(uvicorn.Server):
    """uvicorn's, which leaves the signals to us: it would raise SIGTERM again, and the process end by it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def serve(config: ServeConfig, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; then what is in progress may take `config.grace_s`.

    It listens at once, and is ready once all models are warm.

    Raises:
        SettingsError: the address cannot be had.
        CatError: a bundle cannot be loaded.
    """
    log_as_json()
    listening = listen(host, port)
    service = Service(config)
    try:
        asyncio.run(_serve(service, listening))
    finally:
        if not service.close():
            logger.error("what is computed does not end; the process does")
            sys.stderr.flush()
            os._exit(0)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        SettingsError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(
            f"cannot listen on {host}, port {port} ({reason})", "give another --host or --port"
        ) from error
    # Its connections inherit both. asyncio sets the first one for sockets of a named protocol only, and without it the
    # body of an answer waits 40 ms for the client's acknowledgement of the header.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MS)
    return listening


async def _serve(service: Service, listening: socket.socket) -> None:
    config = service.config
    options: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off", "server_header": False}
    options["limit_concurrency"] = config.queue + _MOST_CONNECTIONS
    grace = max(1, round(config.grace_s))
    server = Server(uvicorn.Config(make_app(service), timeout_graceful_shutdown=grace, **options))
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    service.start()
    serving = asyncio.ensure_future(server.serve([listening]))
    loading = asyncio.ensure_future(_ready(service, listening))
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((serving, stopping, _failure(loading)), return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        await _drain(service)
    server.should_exit = True
    await serving
    if loading.done():
        loading.result()
    loading.cancel()


async def _ready(service: Service, listening: socket.socket) -> None:
    await service.ready()
    host, port = listening.getsockname()[:2]
    logger.info("ready", extra={"host": host, "port": port, "models": list(service.models)})


def _failure(loading: asyncio.Future[None]) -> asyncio.Future[None]:
    """Done if the loading fails; pending if it does not."""
    failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def look(ended: asyncio.Future[None]) -> None:
        if not ended.cancelled() and ended.exception() is not None:
            failure.set_result(None)

    loading.add_done_callback(look)
    return failure


async def _drain(service: Service) -> None:
    """Wait for the requests in progress; those that are not done in time are told so."""
    logger.info("draining", extra={"requests": service.num_orders})
    service.drain()
    ends = asyncio.get_running_loop().time() + max(0.0, service.config.grace_s - _LAST_WORDS_S)
    while service.num_orders and asyncio.get_running_loop().time() < ends:
        await asyncio.sleep(_POLL_S)
    service.give_up(unavailable("the server stops", 5))
