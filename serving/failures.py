"""What a client is told: our own errors in OpenAI's shape, each with its HTTP status."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from cat_pruning.errors import CatError

# OpenAI's name of an error's kind, by its status.
_TYPES: Final = {401: "authentication_error", 429: "rate_limit_error"}


class RequestError(CatError):
    """A request that is not answered with images.

    Attributes:
        status: of HTTP.
        code: OpenAI's short name of the error, for programs.
        param: the field that is wrong; None where it is none.
        headers: of the answer.
    """

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        problem: str,
        remedy: str = "",
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(problem, remedy)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}

    @property
    def outcome(self) -> str:
        """What the metrics call it: see `cat_pruning.serving.metrics.OUTCOMES`."""
        known = {429: "busy", 503: "unavailable", 504: "timeout"}
        return known.get(self.status, "failed" if self.status >= 500 else "refused")

    def body(self) -> dict[str, Any]:
        """What OpenAI's API answers: `{"error": {"message", "type", "param", "code"}}`."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refused(param: str, problem: str, remedy: str = "", *, code: str = "invalid_value") -> RequestError:
    """A field that cannot be obeyed: 400."""
    return RequestError(HTTPStatus.BAD_REQUEST, code, problem, remedy, param=param)


def busy(waiting: int, seconds: int) -> RequestError:
    """The queue is full: 429."""
    return RequestError(
        HTTPStatus.TOO_MANY_REQUESTS,
        "queue_full",
        f"{waiting} images wait already, and these do not fit the queue",
        f"ask again in {seconds} s",
        headers={"Retry-After": str(seconds)},
    )


def unavailable(problem: str, seconds: int) -> RequestError:
    """The server is not ready yet, or will soon be gone: 503."""
    return RequestError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "unavailable",
        problem,
        f"ask again in {seconds} s",
        headers={"Retry-After": str(seconds)},
    )


def too_late(seconds: float) -> RequestError:
    """The request's time is over: 504. OpenAI's clients are told not to try again by themselves."""
    return RequestError(
        HTTPStatus.GATEWAY_TIMEOUT,
        "timeout",
        f"the images were not done within {seconds:g} s, and are given up",
        "ask for fewer of them, fewer steps or a smaller size, or when less is asked for",
        headers={"x-should-retry": "false"},
    )


def failed(request_id: str) -> RequestError:
    """The computation failed: 500, in words that say nothing of the server."""
    return RequestError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "internal_error",
        f"the images could not be computed (request {request_id})",
        "the server's log says why, under this id",
    )
