from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest
import torch
from serving_server import SMALL, Server

from cat_pruning.serving.model import ServedModel

LONG: dict[str, Any] = SMALL | {"num_inference_steps": 100, "speedup": 1}


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def lent(model: ServedModel) -> int:
    """Sessions of images in progress."""
    return model.transformer.sessions.num_lent


@contextmanager
def in_progress(server: Server, **fields: Any) -> Iterator[httpx.Response]:
    """A stream of a long image, whose computation has begun."""
    with server.client.stream("POST", "/v1/images/generations", json=LONG | {"stream": True} | fields) as response:
        until(lambda: lent(server.service.models["sd3-mini"]) == 1)
        yield response


@contextmanager
def held(server: Server) -> Iterator[None]:
    """The computing thread is kept busy meanwhile."""
    free = threading.Event()
    hook = server.service.models["sd3-mini"]._pipe.vae.decoder.register_forward_pre_hook(
        lambda *_: free.wait(20) and None
    )
    try:
        yield
    finally:
        free.set()
        hook.remove()


def in_background(server: Server, **fields: Any) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/v1/images/generations", json=SMALL | fields, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, answers


def test_a_full_queue_says_when_to_ask_again(serve: Callable[..., Any]) -> None:
    with serve(queue=2) as server:
        with held(server):
            first, answers = in_background(server)
            until(lambda: lent(server.service.models["sd3-mini"]) == 1)
            second, more = in_background(server, n=2)
            until(lambda: server.service.num_waiting == 2)
            busy = server.post()
        for thread in (first, second):
            thread.join()
        assert busy.status_code == 429
        assert busy.json()["error"]["code"] == "queue_full"
        assert busy.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(busy.headers["retry-after"]) <= 60
        assert [answer.status_code for answer in answers + more] == [200, 200]
        assert server.metric("cat_requests_total", outcome="busy") == 1
        too_many = server.post(n=3)
        assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")


def test_requests_of_several_clients_share_a_batch(serve: Callable[..., Any]) -> None:
    with serve(max_batch=4) as server:
        with held(server):
            asked = [in_background(server)]
            until(lambda: lent(server.service.models["sd3-mini"]) == 1)
            asked += [in_background(server, seed=seed) for seed in range(3)]
            asked += [in_background(server, num_inference_steps=4)]  # which fits no batch of the others
            until(lambda: server.service.num_waiting == 4)
        for thread, answers in asked:
            thread.join()
            assert answers[0].status_code == 200
        assert server.metric("cat_batch_images_count") == 3
        assert server.metric("cat_batch_images_bucket", le="1.0") == 2


def test_a_client_that_goes_away_ends_its_image(server: Server) -> None:
    model = server.service.models["sd3-mini"]
    cancelled = server.metric("cat_requests_total", outcome="cancelled")
    images = server.metric("cat_images_total", model="sd3-mini")
    with in_progress(server):
        pass
    until(lambda: server.metric("cat_requests_total", outcome="cancelled") == cancelled + 1)
    with pytest.raises(httpx.ReadTimeout):  # the same without a stream
        server.client.post("/v1/images/generations", json=LONG, timeout=0.2)
    until(lambda: server.metric("cat_requests_total", outcome="cancelled") == cancelled + 2)
    until(lambda: lent(model) == 0)
    assert server.service.num_orders == 0
    assert server.metric("cat_images_total", model="sd3-mini") == images
    assert server.post().status_code == 200


def test_what_waits_is_dropped_with_its_client(server: Server) -> None:
    with in_progress(server):
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/v1/images/generations", json=SMALL | {"n": 5}, timeout=0.2)
        until(lambda: server.service.num_waiting == 0)
        assert server.service.num_orders == 1
    until(lambda: server.service.num_orders == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_time_is_over_is_given_up_in_words(serve: Callable[..., Any], stream: bool) -> None:
    with serve(timeout_s=0.3) as server:
        answer = server.client.post("/v1/images/generations", json=LONG | {"stream": stream})
        if stream:
            assert answer.status_code == 200
            name, data = answer.text.strip().split("\n")
            assert name == "event: error"
            error = json.loads(data.removeprefix("data: "))["error"]
        else:
            assert answer.status_code == 504
            assert answer.headers["x-should-retry"] == "false"  # OpenAI's clients would ask again by themselves
            error = answer.json()["error"]
        assert error["code"] == "timeout"
        assert "not done within 0.3 s" in error["message"]
        until(lambda: lent(server.service.models["sd3-mini"]) == 0)
        assert server.metric("cat_requests_total", outcome="timeout") == 1


def test_a_batch_that_fails_is_500_with_its_id_and_the_next_works(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The decoder gives NaN once: what a user would see as a black picture."""
    decoder = server.service.models["sd3-mini"]._pipe.vae.decoder
    hook = decoder.register_forward_hook(lambda module, arguments, image: image * torch.nan)
    try:
        answer = server.client.post("/v1/images/generations", json=SMALL, headers={"x-request-id": "mine-1"})
    finally:
        hook.remove()
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["error"] == {
        "message": "the images could not be computed (request mine-1); the server's log says why, under this id",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    (record,) = [record for record in caplog.records if record.exc_info]
    assert vars(record)["request_id"] == "mine-1"
    assert "not finite" in record.getMessage()
    assert lent(server.service.models["sd3-mini"]) == 0
    assert server.post().status_code == 200


def test_a_server_of_which_every_batch_fails_says_so(serve: Callable[..., Any]) -> None:
    with serve() as server:
        hook = server.service.models["sd3-mini"]._pipe.vae.decoder.register_forward_hook(
            lambda *all_: all_[2] * torch.nan
        )
        try:
            for _ in range(5):
                assert server.client.get("/health/live").status_code == 200
                assert server.post(num_inference_steps=1).status_code == 500
        finally:
            hook.remove()
        assert server.client.get("/health/live").status_code == 503
        assert server.post(num_inference_steps=1).status_code == 200
        assert server.client.get("/health/live").status_code == 200


def test_a_server_that_drains_takes_nothing_new_and_ends_what_it_has(serve: Callable[..., Any]) -> None:
    with serve() as server, in_progress(server, num_inference_steps=10) as response:
        server.service.drain()
        assert server.client.get("/health/ready").status_code == 503
        assert server.client.get("/health/live").status_code == 200
        refused = server.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert "image_generation.completed" in response.read().decode()


def test_a_server_that_stops_tells_who_waits(serve: Callable[..., Any]) -> None:
    with serve() as server, in_progress(server) as response:
        assert server.service.close()
        assert "the server stops" in response.read().decode()


def test_a_key_is_asked_for(serve: Callable[..., Any]) -> None:
    with serve(api_key="größer") as server:
        url = f"{server.url}/v1/models"
        for given in ("", "Bearer wrong", "Basic größer", "Bearer", "größer"):
            answer = httpx.get(url, headers=[(b"Authorization", given.encode())])
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert server.client.get("/v1/models").status_code == 200
        assert httpx.get(f"{server.url}/health/ready").status_code == 200


def test_what_nobody_foresaw_is_500_with_its_id(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server.service.metrics, "text", lambda *_: 1 / 0)
    answer = server.client.get("/metrics", headers={"x-request-id": "mine-2"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "mine-2" in answer.json()["error"]["message"]
    until(lambda: any(record.exc_info for record in caplog.records))  # after the answer
    (record,) = [record for record in caplog.records if record.exc_info]
    assert vars(record)["request_id"] == "mine-2"
