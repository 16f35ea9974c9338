"""cat-serve's HTTP surface on Ray Serve: as many replicas as there is work for, on one machine or many.

    serve run cat_pruning.serving.ray_app:app bundles=build/sd3-mini
    serve deploy deploy/ray.yaml

Each replica is a `Service` behind the same app as cat-serve's: it loads its bundles, warms them up, and only then gets
requests. Ray's proxy spreads these over the replicas, each of which makes batches of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import MutableHeaders

from cat_pruning.bundle.places import is_url
from cat_pruning.bundle.pulling import local_copy
from cat_pruning.bundle.signatures import PublicKey
from cat_pruning.errors import SettingsError
from cat_pruning.installation import require
from cat_pruning.serving.app import make_app
from cat_pruning.serving.cli import API_KEY
from cat_pruning.serving.config import ServeConfig
from cat_pruning.serving.guard import App, Message, Receive, Send
from cat_pruning.serving.service import Service

require("cat_pruning.serving.ray_app", "ray")
from ray import serve  # noqa: E402  # after the line that says what is missing

_RETRY_AFTER_S: Final = 5


class Arguments(BaseModel):
    """What `args` in the config file may say, or `NAME=VALUE` after `serve run`; see `ServeConfig`.

    bundles: directories, which must be there on every machine that replicas may run on, or URLs, of which every machine
    pulls a copy. Ray keeps an application's arguments, and shows them to who may look: the API key is none of them.
    """

    model_config = ConfigDict(extra="forbid")

    bundles: tuple[str, ...] = Field(min_length=1)
    engine: str = "auto"
    public_key: Path | None = None
    max_batch: int | None = None
    max_wait_ms: float = 5.0
    queue: int = 64
    timeout_s: float = 300.0
    max_pixels: int | None = None
    max_steps: int = 100
    max_prompt_chars: int = 4000
    prompt_cache_mb: int = 256

    @field_validator("bundles", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """A command line gives them with commas between."""
        return value.split(",") if isinstance(value, str) else value

    @classmethod
    def read(cls, given: dict[str, Any]) -> Self:
        """The arguments, checked; a path is of this process's directory.

        Raises:
            SettingsError: one is unknown, or makes no sense.
        """
        try:
            arguments = cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            known = ", ".join(cls.model_fields)
            raise SettingsError(f"{name}: {first['msg']}", f"the arguments are {known}") from error
        arguments.config(tuple(map(Path, arguments.bundles)))
        bundles = tuple(each if is_url(each) else str(Path(each).absolute()) for each in arguments.bundles)
        key = None if arguments.public_key is None else arguments.public_key.absolute()
        return arguments.model_copy(update={"bundles": bundles, "public_key": key})

    def config(self, bundles: tuple[Path, ...]) -> ServeConfig:
        """The configuration of a service of these directories.

        Raises:
            SettingsError: an argument makes no sense.
        """
        return ServeConfig(**(dict(self) | {"bundles": bundles}))

    def local(self) -> tuple[Path, ...]:
        """The bundles' directories on this machine; what is elsewhere is pulled. Raises as `local_copy`."""
        key = None if self.public_key is None else PublicKey.read(self.public_key)
        return tuple(local_copy(each, key) if is_url(each) else Path(each) for each in self.bundles)


@serve.deployment(name="Images", health_check_period_s=5, graceful_shutdown_timeout_s=60)
@serve.ingress()
class Images:
    """A replica. Its API key is that of its own environment."""

    async def __init__(self, arguments: Arguments) -> None:  # type: ignore[misc]  # Ray awaits it
        config = arguments.config(await asyncio.to_thread(arguments.local))
        self._service = Service(dataclasses.replace(config, api_key=os.environ.get(API_KEY)))
        self._service.start()
        await self._service.ready()

    def __serve_build_asgi_app__(self) -> App:
        """What Ray calls for the app, once the replica is made."""
        return _without_id(make_app(self._service))

    def check_health(self) -> None:
        """What Ray calls now and then; a replica that raises is replaced."""
        if not self._service.is_live:
            raise RuntimeError("one batch after another fails, or the thread that computes has ended")

    def __del__(self) -> None:
        """What Ray calls when the replica's requests are answered, or its time is over."""
        if hasattr(self, "_service"):
            self._service.close()


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application, for `serve run` and for `import_path` in a config file.

    Raises:
        SettingsError: an argument is unknown, or makes no sense.
    """
    read = Arguments.read(arguments)
    return deployment_of(read).bind(read)


def deployment_of(arguments: Arguments) -> serve.Deployment:
    """`Images`, of which a replica takes at most `queue` requests at once.

    As many wait in Ray's proxy. More are answered with 429 and Retry-After, as by cat-serve.
    """
    deployment: Any = Images
    return deployment.options(
        max_ongoing_requests=arguments.queue,
        max_queued_requests=arguments.queue,
        backpressure_config={"status_code": 429, "retry_after_s": _RETRY_AFTER_S},
    )


def _without_id(answering: App) -> App:
    """The same app, whose answers leave the request's id out: Ray's proxy gave it, and adds it."""

    async def answer(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        async def pass_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await answering(scope, receive, pass_on)

    return answer
