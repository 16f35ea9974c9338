"""`cat-bench-serve` against servers on loopback that answer in every way."""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from answering_server import IMAGE, Reply, answering
from PIL import Image

from cat_pruning.errors import OutputError, ServerError
from cat_pruning.serving import load_cli
from cat_pruning.serving.load import Answer, LoadConfig, Outcome, arrivals, endpoint_of, offer, warm_up
from cat_pruning.serving.load_summary import draw, summarise


def config(address: str, **changes: Any) -> LoadConfig:
    fields = {"endpoint": endpoint_of(address), "rates": (100.0,), "requests": 6, "prompts": ("a star",)}
    return LoadConfig(**(fields | {"timeout_s": 20.0} | changes))


@pytest.mark.parametrize(
    "address",
    ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/images/generations"],
)
def test_the_endpoint_of_an_address(address: str) -> None:
    assert endpoint_of(address) == "http://h:1/v1/images/generations"


def test_an_endpoint_below_another_path() -> None:
    assert endpoint_of("http://h/a/openai/v1") == "http://h/a/openai/v1/images/generations"


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps of mean 1/λ and standard deviation 1/λ, of which a share of e⁻¹ is longer than the mean."""
    times = arrivals(4.0, 20_000, random.Random(0))
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert min(gaps) >= 0
    assert mean == pytest.approx(0.25, rel=0.03)
    assert deviation == pytest.approx(0.25, rel=0.03)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.02)


def test_no_request_waits_for_another() -> None:
    """The server answers none until all of them are there: a client that waited for an answer would wait for ever."""
    all_there = threading.Barrier(6)

    def reply(body: dict[str, Any]) -> Reply:
        all_there.wait(timeout=20)
        return 200, IMAGE

    with answering(reply) as server:
        answers = asyncio.run(offer(config(server.address), 100.0))
    assert [answer.outcome for answer in answers] == [Outcome.COMPLETED] * 6
    last = max(answer.due_s for answer in answers)
    assert all(answer.due_s + answer.latency_s >= last for answer in answers)


def test_every_way_to_answer() -> None:
    replies: dict[str, Reply | None] = {
        "good": (200, {"data": [{"b64_json": "aQ=="}, {"url": "http://x"}], "timings": {"queue_ms": 3, "is": "text"}}),
        "full": (429, {"error": {"message": "the queue is full", "code": None}}),
        "draining": (503, b"<html>"),
        "broken": (500, {"error": {"message": "the engine failed\n"}}),
        "empty": (200, {"data": []}),
        "no JSON": (200, b"["),
        "gone": None,
    }
    with answering(lambda body: replies[body["prompt"]]) as server:
        found = {
            name: asyncio.run(offer(config(server.address, prompts=(name,), requests=1), 1000.0))[0] for name in replies
        }
    assert {name: (answer.outcome.value, answer.said) for name, answer in found.items() if name != "gone"} == {
        "good": ("completed", ""),
        "full": ("rejected", "429 the queue is full"),
        "draining": ("rejected", "503 Service Unavailable"),
        "broken": ("failed", "500 the engine failed"),
        "empty": ("failed", "200, and no image in the answer"),
        "no JSON": ("failed", "200, and no image in the answer"),
    }
    assert found["gone"].outcome is Outcome.FAILED
    assert found["gone"].said.startswith("RemoteProtocolError: ")
    assert found["good"].images == 2
    assert found["good"].timings == {"queue_ms": 3.0}


def test_a_server_that_never_answers_is_given_up() -> None:
    over = threading.Event()

    def reply(body: dict[str, Any]) -> Reply:
        over.wait(20)
        return 200, IMAGE

    with answering(reply) as server:
        (answer,) = asyncio.run(offer(config(server.address, requests=1, timeout_s=0.1), 1000.0))
        over.set()
    assert (answer.outcome, answer.said) == (Outcome.FAILED, "no answer in 0.1 s")


def test_the_same_draws_are_the_same_requests() -> None:
    with answering(lambda body: (200, IMAGE)) as server:
        load = config(server.address, prompts=("a", "b", "c"), sizes=("8x8", "16x8"), image_seed=5, body={"n": 1})
        runs = [asyncio.run(offer(load, 500.0, "secret")) for _ in range(2)]
    assert [answer.due_s for answer in runs[0]] == [answer.due_s for answer in runs[1]]
    first, second = (sorted(bodies, key=lambda body: body["seed"]) for bodies in (server.bodies[:6], server.bodies[6:]))
    assert first == second
    assert [body["seed"] for body in first] == [5, 6, 7, 8, 9, 10]
    assert {body["n"] for body in first} == {1}
    assert {body["response_format"] for body in first} == {"b64_json"}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


def test_a_first_request_that_is_refused() -> None:
    with (
        answering(lambda body: (400, {"error": {"message": "no such size"}})) as server,
        pytest.raises(ServerError, match="400 no such size") as error,
    ):
        asyncio.run(warm_up(config(server.address)))
    assert "--warm-up 0" in error.value.remedy


def answers() -> list[Answer]:
    """Ten requests, one each 0.1 s: eight of 1, 2 … 8 s, one refused, one failed."""
    times = [
        Answer(due_s=0.1 * n, late_s=0.01 * n, latency_s=float(n), outcome=Outcome.COMPLETED, images=2)
        for n in range(1, 9)
    ]
    refused = Answer(due_s=0.9, late_s=0.0, latency_s=0.0, outcome=Outcome.REJECTED, said="429 full")
    failed = Answer(due_s=1.0, late_s=0.0, latency_s=0.5, outcome=Outcome.FAILED, said="500 broken")
    return [*times, refused, failed]


def test_a_summary() -> None:
    summary = summarise(10.0, answers())
    assert (summary.requests, summary.completed, summary.rejected, summary.failed) == (10, 8, 1, 1)
    assert summary.offered_truly_per_s == pytest.approx(10)
    assert summary.seconds == pytest.approx(8.8)  # the eighth was due at 0.8 s, and took 8
    assert (summary.images, summary.images_per_s) == (16, pytest.approx(16 / 8.8))
    assert summary.latency_s == pytest.approx({"mean": 4.5, "p50": 4.5, "p95": 7.65, "p99": 7.93, "max": 8.0})
    assert (summary.rejections, summary.failures) == ({"429 full": 1}, {"500 broken": 1})
    assert summary.sent_late_s == pytest.approx(0.08)


def test_a_picture_of_rates_of_which_one_had_no_answer(tmp_path: Path) -> None:
    none = [Answer(due_s=1.0, late_s=0.0, latency_s=1.0, outcome=Outcome.FAILED, said="x")]
    draw([summarise(1.0, answers()), summarise(2.0, none)], tmp_path / "load.PNG")
    with Image.open(tmp_path / "load.PNG") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    with pytest.raises(OutputError, match=r"--picture .*cannot be written"):
        draw([summarise(1.0, answers())], tmp_path / "nowhere" / "load.svg")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        time.sleep(0.01)
        return (429, {"error": {"message": "the queue is full"}}) if body["seed"] == 3 else (200, IMAGE)

    out = tmp_path / "load.json"
    with answering(reply) as server:
        options = ["--rate", "50,100", "--requests", "4", "--seed", "1", "--speedup", "3", "--size", "96x160"]
        assert load_cli.main([server.address, *options, "--json", str(out), "--body", '{"quality": "low"}']) == 0
    assert {body["size"] for body in server.bodies} == {"96x160"}
    assert {(body["speedup"], body["quality"]) for body in server.bodies} == {(3.0, "low")}
    content = json.loads(out.read_text())
    assert [(rate["offered_per_s"], rate["completed"], rate["rejected"]) for rate in content["rates"]] == [
        (50.0, 3, 1),
        (100.0, 3, 1),
    ]
    assert [len(rate["each"]) for rate in content["rates"]] == [4, 4]
    said = capsys.readouterr().out
    assert "429 the queue is full" in said
    assert len(said.splitlines()) == 4


def test_the_key_is_of_an_environment_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    with answering(lambda body: (200, IMAGE)) as server:
        command = [server.address, "--rate", "1000", "--requests", "1", "--key-variable"]
        assert load_cli.main([*command, "A_KEY"]) == 0
        assert load_cli.main([*command, "NO_SUCH"]) == 2
    assert server.headers[-1]["Authorization"] == "Bearer secret"
    assert "--key-variable 'NO_SUCH': there is no such variable" in capsys.readouterr().err


def test_a_server_of_which_no_request_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(lambda body: (503, b"")) as server:
        assert load_cli.main([server.address, "--rate", "1000", "--requests", "2", "--warm-up", "0"]) == 2
    assert "no request was answered with an image (503 Service Unavailable)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:8000", "ftp://h", "http://", "http://h:x", "http://h:0", "http://[", "http://a b"]
)
def test_an_address_that_is_none(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_cli.main([address])
    assert stop.value.code == 2
    assert "expected an address like http://127.0.0.1:8000" in capsys.readouterr().err


def test_cat_serve_with_a_queue_of_one(serve: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    with serve(queue=1) as server:
        options = ["--rate", "1000", "--requests", "6", "--size", "64x64", "--steps", "3", "--json", str(out)]
        assert load_cli.main([server.url, *options]) == 0
    (rate,) = json.loads(out.read_text())["rates"]
    assert rate["completed"] >= 1
    assert rate["rejected"] >= 3  # one is computed, one waits
    assert rate["completed"] + rate["rejected"] == 6
    assert all(said.startswith("429 1 images wait already") for said in rate["rejections"])
    assert rate["server_ms"].keys() == {"queue_ms", "encode_ms", "steps_ms", "decode_ms", "total_ms"}
