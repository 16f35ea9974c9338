"""What every request passes: its id, its key, its body's size and time, and the edge where errors become answers."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from cat_pruning.serving.failures import RequestError, failed

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MOST_BYTES: Final = 1_000_000  # of a body
_MOST_READ: Final = 50_000_000  # of one that is refused: a client that still sends reads no answer
_BODY_S: Final = 10.0  # for a body to come
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")  # an id that a client may give


class ClientGoneError(Exception):
    """Nobody reads an answer any more."""


class Guard:
    """ASGI middleware around the whole app.

    * A request has an id: the client's `x-request-id` if it is short and plain, else a new one. The answer says it.
    * With a key, whatever is below `/v1/` needs `Authorization: Bearer KEY`, compared in constant time.
    * A body of more than `MOST_BYTES`, or one that does not come, is refused before anything reads it.
    * What nobody foresaw is logged with its traceback, and answered with 500 and the id.

    Args:
        app: behind it.
        api_key: None: anyone may ask.
    """

    def __init__(self, app: App, api_key: str | None = None) -> None:
        self._app, self._key = app, api_key

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, began = Headers(scope=scope), time.monotonic()
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status, is_whole = 0, False

        async def answer(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            self._check_key(scope["path"].removeprefix(scope.get("root_path", "")), headers)
            await self._app(scope, await _with_body(scope, receive), answer)
        except RequestError as error:
            await _respond(error, scope, receive, answer)
        except ClientGoneError:
            logger.info("client is gone", extra={"request_id": request_id})
        except Exception:
            logger.exception("unforeseen", extra={"request_id": request_id})
            if not status:
                await _respond(failed(request_id), scope, receive, answer)
            elif not is_whole:
                raise  # so that the connection is closed
        finally:
            logger.info(
                "request",
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "ms": round((time.monotonic() - began) * 1e3, 1),
                },
            )

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or not path.startswith("/v1/"):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), self._key.encode())  # as it came
        if scheme.lower() != "bearer" or not is_right:
            raise RequestError(
                HTTPStatus.UNAUTHORIZED,
                "invalid_api_key",
                "the API key is missing or wrong",
                "send Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )


async def _respond(error: RequestError, scope: Any, receive: Receive, send: Send) -> None:
    await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)


async def _with_body(scope: MutableMapping[str, Any], receive: Receive) -> Receive:
    """What to receive from, once the whole body is here.

    Raises:
        RequestError: it is too large, or does not come.
    """
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return receive
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(_BODY_S):
            while more and size <= _MOST_READ:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                part, more = message.get("body", b""), message.get("more_body", False)
                size += len(part)
                if size <= MOST_BYTES:
                    parts.append(part)
    except TimeoutError:
        raise RequestError(
            HTTPStatus.REQUEST_TIMEOUT,
            "slow_body",
            f"the body did not come within {_BODY_S:g} s",
            "send it at once",
            headers={"Connection": "close"},
        ) from None
    if size > MOST_BYTES:
        raise RequestError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "body_too_large",
            f"the body has more than {MOST_BYTES} bytes",
            "send less",
            headers={"Connection": "close"},
        )
    body: Message | None = {"type": "http.request", "body": b"".join(parts), "more_body": False}

    async def once() -> Message:
        nonlocal body
        if body is None:
            return await receive()
        message, body = body, None
        return message

    return once
