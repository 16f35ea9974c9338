"""Requests that nobody means well by: each is refused in words, and the server is as it was."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from serving_server import SMALL, Server

from cat_pruning.serving import guard
from cat_pruning.serving import server as process

URL = "/v1/images/generations"
_DEEP = "[" * 100_000 + "]" * 100_000


def body(**fields: Any) -> str:
    return json.dumps(SMALL | fields)


# By name: what is sent as the body, and the field that the answer names; None where it names none.
FIELDS: dict[str, tuple[str, str | None]] = {
    **{
        f"size {size!r}": (body(size=size), "size")
        for size in (
            "0x0", "64x", "x64", "64", "-64x64", "64x-64", "99999x99999", "100000x8", "9" * 5000 + "x8", "65x64", "1x1",
            "16x16", "8192x8192", "64X64", "64×64", "６４x６４", "64x64\n", "64x64x64", "1e2x64", "../../etc", "", " ",
            64, 64.0, None.__class__.__name__, ["64x64"], {"w": 64}, True,
        )
    },
    **{
        f"steps {steps!r}": (body(num_inference_steps=steps), "num_inference_steps")
        for steps in (0, -1, 101, 10**9, 10**30, 1.5, "3", True, [3], math.nan, math.inf)
    },
    **{
        f"guidance {guidance!r}": (body(guidance_scale=guidance), "guidance_scale")
        for guidance in (math.nan, math.inf, -math.inf, -1, 1e300, 101, "3", True, [3.0])
    },
    **{f"n {n!r}": (body(n=n), "n") for n in (0, -1, 11, 10**18, "2", 1.5, True)},
    **{f"seed {seed!r}": (body(seed=seed), "seed") for seed in (-1, 2**63, 10**40, 0.5, "0", [1])},
    **{f"speedup {speedup!r}": (body(speedup=speedup), "speedup") for speedup in (0, 0.99, 1e9, 7.5, "2", math.nan)},
    **{
        f"prompt {prompt!r:.20}": (json.dumps(SMALL | {"prompt": prompt}), "prompt")
        for prompt in (
            "", " ", "\n\t", "\ud800", "x" * 4001, [], [""], ["x"] * 65, [1], {"a": 1}, 1, None, True, ["x", ["y"]],
            ["\udfff"], ["x" * 4001, "y"],
        )
    },
    "no prompt": ('{"n": 1}', "prompt"),
    "negative prompt": (body(negative_prompt="x" * 4001), "negative_prompt"),
    "negative prompt without guidance": (body(negative_prompt="x", guidance_scale=1.0), "negative_prompt"),
    "url": (body(response_format="url"), "response_format"),
    "format": (body(output_format="svg"), "output_format"),
    "path as a format": (body(output_format="../x"), "output_format"),
    "compression": (body(output_format="jpeg", output_compression=101), "output_compression"),
    "compressed png": (body(output_compression=50), None),
    "previews": (body(stream=True, partial_images=4), "partial_images"),
    "previews without a stream": (body(partial_images=1), None),
    "stream": (body(stream="yes"), "stream"),
    "preset": (body(preset="__class__"), "preset"),
    "preset and speedup": (body(preset="paper", speedup=2), None),
    "quality": (body(quality="hd"), "quality"),
    "style": (body(style="vivid"), "style"),
    "unknown field": (body(callback="http://127.0.0.1/"), "callback"),
    "unicode field": (body(**{"größe\u202e": 1}), "größe\u202e"),
    "dunder": (body(__proto__={}, constructor=1), "__proto__"),
    "too many images": (body(prompt=["x"] * 20, n=10), "n"),
}  # fmt: skip

# By name: the body, and the status.
BODIES: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "null": (b"null", 400),
    "list": (b"[]", 400),
    "number": (b"1e999", 400),
    "half": (b'{"prompt": "x"', 400),
    "no utf-8": (b'{"prompt": "\xff\xfe"}', 400),
    "utf-16": ('{"prompt": "x", "size": 1}'.encode("utf-16"), 400),
    "deep": (_DEEP.encode(), 400),
    "deep prompt": (b'{"prompt": ' + _DEEP.encode() + b"}", 400),
    "long number": (b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}", 400),
    "many fields": (json.dumps({f"f{number}": 1 for number in range(40_000)}).encode(), 400),
    "many prompts": (json.dumps({"prompt": ["x"] * 150_000}).encode(), 400),
    "ten megabytes": (b'{"prompt": "' + b"x" * 10_000_000 + b'"}', 413),
    "python": (b"{'prompt': 'x'}", 400),
}

# By name: method, path, and the status.
PATHS: dict[str, tuple[str, str, int]] = {
    "root": ("GET", "/nothing", 404),
    "up": ("GET", "/../../etc/passwd", 404),
    "encoded up": ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
    "page": ("GET", "/page/../../../pyproject.toml", 404),
    "null": ("GET", "/%00", 404),
    "long": ("GET", "/" + "a" * 20_000, 404),
    "get": ("GET", URL, 405),
    "delete": ("DELETE", "/v1/models", 405),
    "trace": ("TRACE", URL, 405),
    "edits": ("POST", "/v1/images/edits", 404),
    "model": ("GET", "/v1/models/../../x", 404),
}


def check(answer: httpx.Response, server: Server) -> dict[str, Any]:
    """What every refusal is like."""
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert 10 < len(error["message"]) < 600
    bundle = str(server.service.config.bundles[0])
    for secret in ("Traceback", 'File "', "site-packages", bundle, "cat_pruning"):
        assert secret not in answer.text
    assert answer.headers["x-request-id"]
    return error


@pytest.mark.parametrize("name", FIELDS)
def test_fields(server: Server, name: str) -> None:
    content, param = FIELDS[name]
    answer = server.client.post(URL, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = check(answer, server)
    assert error["param"] == param


@pytest.mark.parametrize("name", BODIES)
def test_bodies(server: Server, name: str) -> None:
    content, status = BODIES[name]
    answer = server.client.post(URL, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    check(answer, server)


@pytest.mark.parametrize("name", PATHS)
def test_paths(server: Server, name: str) -> None:
    method, path, status = PATHS[name]
    answer = server.client.request(method, path)
    assert answer.status_code == status
    check(answer, server)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "image/png"]
)
def test_other_kinds_of_body(server: Server, kind: str) -> None:
    """A page of another site can send these without asking; the JSON of one is refused."""
    answer = server.client.post(URL, content=body(), headers={"Content-Type": kind})
    assert answer.status_code == 400
    check(answer, server)


def raw(server: Server, request: bytes) -> bytes:
    """What comes back for bytes that no client sends."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        parts = [b""]
        with suppress(OSError):  # it may be closed before all is sent
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    "request_",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
    ids=["bytes", "version", "negative length", "huge length", "chunks", "header"],
)
def test_no_http(server: Server, request_: bytes) -> None:
    answer = raw(server, request_)
    page = (b"HTTP/1.1 200",) if b"HTTP/9.9" in request_ else ()  # uvicorn's parser takes any version for its own
    assert not answer or answer.startswith((b"HTTP/1.1 4", *page)), answer
    assert b" 500 " not in answer
    assert b"Traceback" not in answer
    assert server.client.get("/health/live").status_code == 200


def test_a_body_that_does_not_come(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_BODY_S", 0.1)
    with serve() as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            answer = b"".join(iter(lambda: connection.recv(65536), b""))  # until it is closed
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"the body did not come within" in answer


def test_a_client_that_takes_nothing_is_let_go(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_STALLED_MS", 100)
    with serve() as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.05)
        host, port = server.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        ends, asked = time.monotonic() + 20, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 500
        with pytest.raises(ConnectionError):
            _send_until(connection, asked, ends)
        assert server.client.get("/health/live").status_code == 200


def _send_until(connection: socket.socket, content: bytes, ends: float) -> None:
    while time.monotonic() < ends:
        with suppress(TimeoutError):  # the server takes nothing more either
            connection.send(content)


def test_nothing_grows_and_it_still_draws(server: Server) -> None:
    """After every hostile request once more, twice: the first time may fill what is kept for good."""
    headers = {"Content-Type": "application/json"}
    process, failed, refused = (
        psutil.Process(),
        *(server.metric("cat_requests_total", outcome=outcome) for outcome in ("failed", "refused")),
    )
    resident = []
    for _ in range(2):
        for content, _param in FIELDS.values():
            server.client.post(URL, content=content, headers=headers)
        for content, _status in BODIES.values():
            server.client.post(URL, content=content, headers=headers)
        resident.append(process.memory_info().rss)
    assert resident[1] - resident[0] < 20e6
    assert server.service.num_orders == 0
    assert server.service.num_waiting == 0
    assert server.metric("cat_requests_total", outcome="failed") == failed
    too_large = sum(status == 413 for _, status in BODIES.values())  # which nothing reads
    expected = refused + 2 * (len(FIELDS) + len(BODIES) - too_large)
    assert server.metric("cat_requests_total", outcome="refused") == expected
    assert server.post().status_code == 200
