"""Open-loop load: requests that arrive at random times, however long the earlier ones take.

A client that waits for an answer before it asks again slows down with the server, and hides its queue. Users do not
wait for one another, so here the gaps between requests are drawn from the exponential distribution (a Poisson process),
and a latency is counted from when a request was due, not from when the client came to send it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import httpx2

from cat_pruning.errors import ServerError

_PATH: Final = "/images/generations"
_REJECTIONS: Final = (429, 503)  # a full queue, and a server that drains or warms up
_SHOWN: Final = 200  # characters of an answer in a message


class Outcome(StrEnum):
    """What became of a request."""

    COMPLETED = "completed"
    REJECTED = "rejected"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """The load: what is asked for, and how often.

    endpoint: the address of images/generations. rates: requests per second, each measured by itself, in turn.
    requests: of each rate. prompts, sizes ("128x128"): one of each is drawn for a request. body: fields of every
    request besides. image_seed: the first request's `seed`, the next one's is one more; None sends none. draws: the
    seed of arrivals and draws. warm_up: requests before the first rate that are not counted.
    """

    endpoint: str
    rates: tuple[float, ...]
    requests: int
    prompts: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    body: Mapping[str, Any] = field(default_factory=dict)
    image_seed: int | None = None
    draws: int = 0
    warm_up: int = 1
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back of one request.

    due_s: when it was to be sent, from the beginning. late_s: how much later the client sent it. latency_s: from when
    it was due to the answer's last byte. said: of a failure, in words. timings: the server's own, in milliseconds.
    """

    due_s: float
    late_s: float
    latency_s: float
    outcome: Outcome
    images: int = 0
    said: str = ""
    timings: Mapping[str, float] = field(default_factory=dict)


def endpoint_of(address: str) -> str:
    """The address of images/generations, of a server's, an API's (…/v1) or its own."""
    base = address.rstrip("/")
    if base.endswith(_PATH):
        return base
    return base + (_PATH if base.endswith("/v1") else f"/v1{_PATH}")


def arrivals(rate: float, count: int, draws: random.Random) -> list[float]:
    """The times (seconds) of `count` events of a Poisson process with `rate` events per second."""
    return list(itertools.accumulate(draws.expovariate(rate) for _ in range(count)))


async def warm_up(config: LoadConfig, key: str | None = None) -> None:
    """Send the requests that are not counted, one at a time.

    Raises:
        ServerError: one of them is not answered with an image.
    """
    body = _body(config, 0, random.Random(config.draws))
    async with _client(config, key) as client:
        for _ in range(config.warm_up):
            answer = await _ask(client, config, body, due=0.0, late=0.0, due_at=asyncio.get_running_loop().time())
            if answer.outcome is not Outcome.COMPLETED:
                raise ServerError(
                    f"{config.endpoint} did not answer the first request with an image: {answer.said}",
                    "mend the address, the options or the server; --warm-up 0 measures all the same",
                )


async def offer(
    config: LoadConfig, rate: float, key: str | None = None, answered: Callable[[], None] = lambda: None
) -> list[Answer]:
    """Send the requests of one rate, and wait for all answers.

    Args:
        config: the load.
        rate: requests per second.
        key: for the header Authorization.
        answered: is called after every answer.

    Returns:
        An answer for every request, in the order of their arrivals.
    """
    draws = random.Random(f"{config.draws} {rate}")
    bodies = [_body(config, number, draws) for number in range(config.requests)]
    times = arrivals(rate, config.requests, draws)
    async with _client(config, key) as client:
        loop = asyncio.get_running_loop()
        started = loop.time()

        async def one(body: Mapping[str, Any], due: float) -> Answer:
            await asyncio.sleep(max(0.0, started + due - loop.time()))
            late = loop.time() - started - due
            answer = await _ask(client, config, body, due=due, late=late, due_at=started + due)
            answered()
            return answer

        return await asyncio.gather(*map(one, bodies, times))


def _client(config: LoadConfig, key: str | None) -> httpx2.AsyncClient:
    """A client with as many connections as there are requests: none waits for another."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
    return httpx2.AsyncClient(headers=headers, limits=limits, timeout=config.timeout_s)


def _body(config: LoadConfig, number: int, draws: random.Random) -> dict[str, Any]:
    body = {"prompt": draws.choice(config.prompts), "response_format": "b64_json", **config.body}
    if config.sizes:
        body["size"] = draws.choice(config.sizes)
    if config.image_seed is not None:
        body["seed"] = config.image_seed + number
    return body


async def _ask(
    client: httpx2.AsyncClient, config: LoadConfig, body: Mapping[str, Any], *, due: float, late: float, due_at: float
) -> Answer:
    """Send one request; whatever goes wrong with it is an answer too."""
    images, timings = 0, dict[str, float]()
    try:
        async with asyncio.timeout(config.timeout_s):
            response = await client.post(config.endpoint, json=body)
        outcome, images, said, timings = _judged(response)
    except (TimeoutError, httpx2.TimeoutException):
        outcome, said = Outcome.FAILED, f"no answer in {config.timeout_s:g} s"
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        outcome, said = Outcome.FAILED, " ".join(f"{type(error).__name__}: {error}".split())
    latency = asyncio.get_running_loop().time() - due_at
    return Answer(due_s=due, late_s=late, latency_s=latency, outcome=outcome, images=images, said=said, timings=timings)


def _judged(response: httpx2.Response) -> tuple[Outcome, int, str, dict[str, float]]:
    """The outcome, the number of images, what is said of a failure, and the server's own times."""
    content = _json(response)
    if response.status_code == 200:
        data = content.get("data")
        images = sum(isinstance(each, dict) and bool(each.get("b64_json") or each.get("url")) for each in data or ())
        if images:
            return Outcome.COMPLETED, images, "", _numbers(content.get("timings"))
        return Outcome.FAILED, 0, "200, and no image in the answer", {}
    outcome = Outcome.REJECTED if response.status_code in _REJECTIONS else Outcome.FAILED
    error = content.get("error")
    words = error.get("message") if isinstance(error, dict) else None
    said = f"{response.status_code} {words or response.reason_phrase}"
    return outcome, 0, " ".join(said.split())[:_SHOWN], {}


def _json(response: httpx2.Response) -> Mapping[str, Any]:
    try:
        content = json.loads(response.content)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _numbers(timings: Any) -> dict[str, float]:
    if not isinstance(timings, dict):
        return {}
    return {name: float(value) for name, value in timings.items() if isinstance(value, int | float)}


def by_outcome(answers: Sequence[Answer], outcome: Outcome) -> list[Answer]:
    """Those answers that came out so."""
    return [answer for answer in answers if answer.outcome is outcome]
