"""`cat-serve` as a process: how it begins, what it logs, how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from serving_server import SMALL
from signing_keys import write_keys

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.changes import sign_bundle
from cat_pruning.errors import BundleError, EngineError, SettingsError
from cat_pruning.serving import server
from cat_pruning.serving.cli import main
from cat_pruning.serving.config import ServeConfig
from cat_pruning.serving.model import ServedModel

_SERVE = "import sys; from cat_pruning.serving.cli import main; sys.exit(main())"


@contextmanager
def process(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _SERVE, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment) as running:
        try:
            yield running
        finally:
            running.kill()


def logged(running: subprocess.Popen[str], message: str) -> dict[str, Any]:
    """The next line of its log with this message."""
    assert running.stderr is not None
    for line in running.stderr:
        said: dict[str, Any] = json.loads(line)
        if said["message"] == message:
            return said
    raise AssertionError(message)


@pytest.mark.long
def test_sigterm_lets_it_end_what_it_has(served_bundle: Path) -> None:
    body = SMALL | {"stream": True, "num_inference_steps": 20, "partial_images": 3, "speedup": 1}
    with process(served_bundle, "--port", "0", "--grace", "20", CAT_SERVE_API_KEY="secret") as running:
        port = logged(running, "ready")["port"]
        url, headers = f"http://127.0.0.1:{port}/v1/images/generations", {"Authorization": "Bearer secret"}
        assert httpx.post(url, json=body).status_code == 401
        with httpx.stream("POST", url, json=body, headers=headers | {"x-request-id": "mine"}, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: image_generation.partial_image"
            running.send_signal(signal.SIGTERM)
            assert logged(running, "draining")["requests"] == 1
            assert "event: image_generation.completed" in list(lines)
        assert logged(running, "images")["request_id"] == "mine"
        with pytest.raises(httpx.TransportError):  # refused, or closed without an answer
            _ask_until_it_is_gone(url)
        assert running.wait(20) == 0


def _ask_until_it_is_gone(url: str) -> None:
    ends = time.monotonic() + 10
    while time.monotonic() < ends:
        httpx.get(url)
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone"], "gone does not exist"),
        ([], "the following arguments are required: bundle"),
        (["x", "--queue", "0"], "expected a whole number from 1"),
        (["x", "y/x"], "two bundles have one name"),
        (["x", "--timeout", "0"], "expected a number from 0.001"),
        (["x", "--host", "nan", "--port", "99999"], "expected a whole number from 0 to 65535"),
    ],
)
def test_mistakes_are_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_bundles_that_must_be_signed(
    served_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is loaded; signed, they are loaded with the key."""
    copied = Path(shutil.copytree(served_bundle, tmp_path / "sd3-mini", copy_function=os.link))
    private, public = write_keys(tmp_path)
    served: list[tuple[str, Path]] = []

    def serve(config: ServeConfig, *_: object) -> None:
        served.extend(zip(config.names, config.bundles, strict=True))

    monkeypatch.setattr("cat_pruning.serving.server.serve", serve)
    assert main([str(copied), "--public-key", str(public)]) == 2
    assert capsys.readouterr().err.startswith(f"cat-serve: {copied} is not signed: it has no manifest.json.sig")
    config = ServeConfig(bundles=(copied,), engine="onnxruntime", public_key=public)
    with pytest.raises(BundleError, match="is not signed"):
        ServedModel.load("sd3-mini", copied, config)
    sign_bundle(Bundle.open(copied), private)
    assert main([str(copied), "--public-key", str(public)]) == 0
    assert main([f"file://{copied}", "--public-key", str(public)]) == 0
    assert served == [("sd3-mini", copied)] * 2
    keys: list[object] = []

    def load(path: Path, engine: str, *, public_key: Path | None, prompt_cache_bytes: int) -> object:
        assert prompt_cache_bytes == config.prompt_cache_mb * 2**20
        keys.append(public_key)
        raise EngineError("loaded")

    monkeypatch.setattr("cat_pruning.serving.model.load_pipeline", load)
    with pytest.raises(EngineError, match="loaded"):
        ServedModel.load("sd3-mini", copied, config)
    assert keys == [public]


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"timeout_s": 0.0}, {"max_wait_ms": -1.0}, {"bundles": ()}, {"api_key": " "}], ids=str
)
def test_a_configuration_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        ServeConfig(**{"bundles": (Path("x"),)} | options)


def test_a_bundle_that_cannot_be_loaded_ends_it(served_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "log_as_json", lambda: None)
    with pytest.raises(EngineError):
        server.serve(ServeConfig(bundles=(served_bundle,), engine="tensorrt"), "127.0.0.1", 0)


def test_an_address_that_is_taken_is_a_line() -> None:
    with server.listen("127.0.0.1", 0) as taken, pytest.raises(SettingsError, match="Address already in use"):
        server.listen("127.0.0.1", taken.getsockname()[1])


def test_connections_send_at_once_and_end_where_nothing_is_taken() -> None:
    """asyncio sets the first for sockets of a named protocol only; an answer came 40 ms late."""
    with server.listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


@pytest.mark.long
def test_no_document_of_ours_makes_it_fail(serve: Callable[..., Any]) -> None:
    """Requests that schemathesis makes of our OpenAPI document, right ones and wrong ones; none takes long."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    with serve(max_steps=2, max_pixels=4096) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        for operation in schema.get_all_operations():
            tried: list[int] = []

            @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.ok().as_strategy())
            def ask(case: Any) -> None:
                answer = case.call()
                tried.append(answer.status_code)  # noqa: B023  # it is called within the loop
                # The server's limits are in no document.
                case.validate_response(answer, excluded_checks=[positive_data_acceptance])

            ask()
            assert tried
            assert max(tried) < 500
