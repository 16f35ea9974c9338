"""The HTTP surface: OpenAI's images API, models, health, metrics and the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from http import HTTPStatus
from importlib.resources import files
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import cat_pruning
from cat_pruning.serving import answers
from cat_pruning.serving.answers import Error, Images, Models
from cat_pruning.serving.failures import RequestError, failed
from cat_pruning.serving.guard import App, ClientGoneError, Guard
from cat_pruning.serving.orders import Done, Order, Preview
from cat_pruning.serving.requests import ImageRequest
from cat_pruning.serving.service import Service, State

_CLIENT_GONE: Final = 499  # as nginx logs it; nobody reads the answer
_PAGE: Final = "page/index.html"
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": Error} for status in (400, 401, 404, 408, 413, 429, 500, 503, 504)
}
_T = TypeVar("_T")


def make_app(service: Service) -> App:
    """The ASGI app over a service, which whoever calls this starts and closes."""
    app = FastAPI(title="cat-serve", version=cat_pruning.__version__, redoc_url=None)
    app.state.metrics = service.metrics
    app.add_exception_handler(RequestError, _told)
    app.add_exception_handler(RequestValidationError, _told)
    app.add_exception_handler(HTTPException, _told)
    app.add_exception_handler(Exception, _unforeseen)

    @app.post("/v1/images/generations", responses={**_ERRORS, 200: _STREAM}, response_model=Images)
    async def generate(body: ImageRequest, request: Request) -> Response:
        """Generate images. With `stream`, server-sent events: previews, then each image."""
        order = service.submit(body, request.state.request_id)
        if body.stream:
            return _Stream(service, order, body)
        try:
            done = await _while_connected(request, _all(service, order))
        except ClientGoneError:
            return Response(status_code=_CLIENT_GONE)
        finally:
            service.end(order)
        answer = await asyncio.to_thread(answers.images, body, order.job.size, done, order.began)
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> Models:
        """The bundles that are served, and what each can be asked for."""
        return Models(data=[answers.Model(**model.described()) for model in service.models.values()])

    @app.get("/health/live", responses={503: {}})
    async def live() -> JSONResponse:
        """Whether the process should go on: no if one batch after another fails, as after an error of CUDA's."""
        is_live = service.is_live
        return JSONResponse({"status": "live" if is_live else "failing"}, 200 if is_live else 503)

    @app.get("/health/ready", responses={503: {}})
    async def ready() -> JSONResponse:
        """Whether it takes requests: every model is loaded and warm, and it does not stop."""
        is_ready = service.state is State.READY
        return JSONResponse({"status": str(service.state)}, 200 if is_ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        text = service.metrics.text(service.models.values(), service.num_waiting)
        return Response(text, media_type="text/plain; version=0.0.4")

    page = files("cat_pruning.serving").joinpath(_PAGE)
    if page.is_file():
        app.add_route("/", _answer_with(page.read_text(encoding="utf-8")))
    return Guard(app, service.config.api_key)


_STREAM: Final[dict[str, Any]] = {
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
    "description": "The images; as events where `stream` is true.",
}


def _answer_with(html: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return HTMLResponse(html)

    return answer


class _Stream(StreamingResponse):
    """The events of one order; a client that goes away cancels it."""

    def __init__(self, service: Service, order: Order, request: ImageRequest) -> None:
        self._service, self._order, self._request = service, order, request
        super().__init__(self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.end(self._order)

    async def _events(self) -> AsyncIterator[str]:
        order, request, size = self._order, self._request, self._order.job.size
        try:
            async for event in self._service.events(order):
                if isinstance(event, Preview):
                    yield await asyncio.to_thread(answers.partial_event, request, size, event)
                elif isinstance(event, Done):
                    yield await asyncio.to_thread(answers.completed_event, request, size, event, order.began)
        except RequestError as error:
            yield answers.event("error", error.body())


async def _all(service: Service, order: Order) -> list[Done]:
    done = [event async for event in service.events(order) if isinstance(event, Done)]
    return sorted(done, key=lambda each: each.index)


async def _while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns; it is cancelled when the client goes away.

    Raises:
        ClientGoneError: the client went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    """The guard logs it."""
    told = failed(request.state.request_id)
    return JSONResponse(told.body(), told.status)


async def _told(request: Request, error: Exception) -> JSONResponse:
    """Every error in OpenAI's shape."""
    if isinstance(error, RequestError):
        return JSONResponse(error.body(), error.status, error.headers)
    if isinstance(error, RequestValidationError):
        request.app.state.metrics.requests.labels("refused").inc()
        told = _invalid(error)
        return JSONResponse(told.body(), told.status)
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    if status == HTTPStatus.BAD_REQUEST:  # a body that is no JSON at all
        request.app.state.metrics.requests.labels("refused").inc()
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "bad_request")
    told = RequestError(status, code, str(error.detail), "GET /docs says what there is")
    return JSONResponse(told.body(), status, error.headers)


def _invalid(error: RequestValidationError) -> RequestError:
    """The first thing that is wrong with a body, by its field."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    field = where[0] if where and first["type"] != "json_invalid" else None
    said = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        said = f"there is no such field; known are {', '.join(ImageRequest.model_fields)}"
    name = f"{field[:40].encode('ascii', 'backslashreplace').decode()}: " if field else ""
    return RequestError(HTTPStatus.BAD_REQUEST, "invalid_value", f"{name}{said}", param=field and field[:40])
