"""cat-serve's HTTP surface on Ray Serve: as many replicas as there is work for, on one machine or many.

    serve run cat_pruning.serving.ray_app:app bundles=build/sd3-mini
    serve deploy deploy/ray.yaml

Each replica is a `Service` behind the same app as cat-serve's: it loads its bundles, warms them up, and only then gets
requests. Ray's proxy spreads these over the replicas, each of which makes batches of its own.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import MutableHeaders

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
    """What `args` in the config file may say, or `NAME=VALUE` after `serve run`; see `ServeConfig`."""

    model_config = ConfigDict(extra="forbid")

    bundles: tuple[Path, ...] = Field(min_length=1)
    engine: str = "auto"
    max_batch: int | None = None
    max_wait_ms: float = 5.0
    queue: int = 64
    timeout_s: float = 300.0
    max_pixels: int | None = None
    max_steps: int = 100
    max_prompt_chars: int = 4000

    @field_validator("bundles", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """A command line gives them with commas between."""
        return value.split(",") if isinstance(value, str) else value


@serve.deployment(name="Images", health_check_period_s=5, graceful_shutdown_timeout_s=60)
@serve.ingress()
class Images:
    """A replica.

    Args:
        config: what it serves. The bundles must be there on every machine that replicas may run on. The API key is that
            of the replica's own environment: Ray keeps what an application is made of, and shows it to who may look.
    """

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]  # Ray awaits it
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
    config = config_of(arguments)
    return deployment_of(config).bind(config)


def deployment_of(config: ServeConfig) -> serve.Deployment:
    """`Images`, of which a replica takes at most `config.queue` requests at once.

    As many wait in Ray's proxy. More are answered with 429 and Retry-After, as by cat-serve.
    """
    deployment: Any = Images
    return deployment.options(
        max_ongoing_requests=config.queue,
        max_queued_requests=config.queue,
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


def config_of(arguments: dict[str, Any]) -> ServeConfig:
    """The replicas' configuration.

    Raises:
        SettingsError: an argument is unknown, or makes no sense.
    """
    try:
        given = Arguments.model_validate(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(Arguments.model_fields)
        raise SettingsError(f"{name}: {first['msg']}", f"the arguments are {known}") from error
    bundles = tuple(path.absolute() for path in given.bundles)  # replicas run in other directories
    return ServeConfig(**(dict(given) | {"bundles": bundles}))
