"""Whether cat-serve stays right and small under mixed load: `make soak-serve`.

A server in a process of its own is asked by several clients for half an hour: images of several sizes, seeds and
numbers, previews, bursts that fill the queue, requests that are wrong, clients that leave amid an image, that send half
a body, or that take no answer. Every picture is compared with one that the pipeline made directly: to the bit where a
batch has one image, else to two grey values. It passes where no picture is wrong, every request is answered or refused
in words, no session is left lent, and the resident memory of the last quarter is within 2 % of the second's.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads sleep between steps

import argparse
import base64
import functools
import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import numpy as np
import psutil
from machine import write_result
from PIL import Image
from serving_load import PROMPTS, URL, Direct
from soak_memory import quarter_means

from cat_pruning.settings import PruneSettings

MOST_GROWTH: Final = 0.02
SIZES: Final = ((64, 64), (128, 128), (96, 128))  # (height, width)
PRESETS: Final = ("paper", "forecast")
SEEDS: Final = 4
STEPS: Final = 10
WRONG: Final[tuple[Any, ...]] = (
    {"prompt": ""}, {"size": "65x64"}, {"n": 0}, {"seed": -1}, {"num_inference_steps": 10**9}, {"speedup": "x"},
    {"response_format": "url"}, {"unknown": 1}, {"prompt": ["x"] * 65}, {"size": None, "guidance_scale": "nan"},
)  # fmt: skip


class Soak:
    """The clients, and what they saw.

    Args:
        url: of the server.
        direct: the pipeline to compare with.
        tolerance: grey values that a picture may differ by.
    """

    def __init__(self, url: str, direct: Direct, tolerance: int) -> None:
        self._url, self._direct, self._tolerance = url, direct, tolerance
        self._alone = threading.Lock()
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    def client(self, seed: int, ends: float) -> None:
        """Ask for one thing after another."""
        chance = random.Random(seed)
        acts = (self._images, self._leave, self._mistake, self._half, self._stall, self._burst)
        with httpx.Client(base_url=self._url, timeout=300) as client:
            while time.monotonic() < ends:
                (act,) = chance.choices(acts, weights=(60, 10, 15, 4, 4, 7))
                try:
                    self.seen[f"{act.__name__[1:]}: {act(client, chance)}"] += 1
                except Exception as error:  # noqa: BLE001  # told at the end
                    self.wrong.append(f"{act.__name__[1:]}: {type(error).__name__}: {error}"[:300])

    def _images(self, client: httpx.Client, chance: random.Random) -> str:
        body = self._body(chance) | {"n": chance.choice((1, 1, 2))}
        answer = client.post(URL, json=body)
        if answer.status_code == 200:
            for datum in answer.json()["data"]:
                self._compare(body, datum)
        return self._status(answer, 200, 429)

    def _leave(self, client: httpx.Client, chance: random.Random) -> str:
        body = self._body(chance) | {"num_inference_steps": 40, "stream": True, "partial_images": 3}
        with client.stream("POST", URL, json=body) as answer:
            if answer.status_code == 429:
                return "429"
            for number, _ in enumerate(answer.iter_lines()):
                if number == chance.choice((0, 3)):
                    break
        return "left"

    def _mistake(self, client: httpx.Client, chance: random.Random) -> str:
        return self._status(client.post(URL, json=self._body(chance) | chance.choice(WRONG)), 400)

    def _half(self, client: httpx.Client, chance: random.Random) -> str:
        with self._connection() as connection:
            connection.sendall(b"POST " + URL.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{")
            time.sleep(chance.random() * 3)
        return "left"

    def _stall(self, client: httpx.Client, chance: random.Random) -> str:
        body = json.dumps(self._body(chance) | {"n": 2}).encode()
        head = (
            f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with self._connection() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.sendall(head.encode() + body)
            time.sleep(chance.random() * 10)
        return "left"

    def _burst(self, client: httpx.Client, chance: random.Random) -> str:
        return self._status(client.post(URL, json=self._body(chance) | {"n": 8, "num_inference_steps": 2}), 200, 429)

    def _connection(self) -> socket.socket:
        host, port = self._url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=30)

    def _body(self, chance: random.Random) -> dict[str, Any]:
        height, width = chance.choice(SIZES)
        return {
            "prompt": chance.choice(PROMPTS),
            "seed": chance.randrange(SEEDS),
            "size": f"{width}x{height}",
            "preset": chance.choice(PRESETS),
            "num_inference_steps": STEPS,
            "guidance_scale": 3.0,
        }

    def _status(self, answer: httpx.Response, *expected: int) -> str:
        said = answer.json().get("error", {}).get("message", "")
        if answer.status_code not in expected or (answer.status_code >= 400 and len(said) < 10):
            raise AssertionError(f"{answer.status_code}: {answer.text[:200]}")
        return str(answer.status_code)

    def _compare(self, body: dict[str, Any], datum: dict[str, Any]) -> None:
        width, height = map(int, body["size"].split("x"))
        with Image.open(io.BytesIO(base64.b64decode(datum["b64_json"]))) as image:
            mine = np.asarray(image).astype(np.int16)
        with self._alone:
            expected = self._expected(body["prompt"], datum["seed"], body["preset"], height, width)
        if (most := int(np.abs(mine - expected).max())) > self._tolerance:
            raise AssertionError(f"a picture differs by {most}: {body}")
        self.seen["pictures compared"] += 1

    @functools.cache  # noqa: B019  # one soak per process
    def _expected(self, prompt: str, seed: int, preset: str, height: int, width: int) -> Any:
        settings = PruneSettings.preset(preset)
        (image,) = self._direct([prompt], [seed], settings, (height, width), STEPS)
        return np.asarray(image).astype(np.int16)


def main() -> int:
    """Soak, and write benchmarks/results/NAME.json; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle of sd3-mini")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--max-batch", type=int, default=1)
    parser.add_argument("--name", default="soak-serve", help="of the file that is written")
    arguments = parser.parse_args()
    direct = Direct(arguments.bundle)
    code = "import sys; from cat_pruning.serving.cli import main; sys.exit(main())"
    options = ["--port", "0", "--queue", "12", "--max-batch", str(arguments.max_batch), "--timeout", "120"]
    command = [sys.executable, "-c", code, str(arguments.bundle), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            result = soak(server, direct, arguments.minutes, arguments.clients, arguments.max_batch)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    result["exit_code"] = server.returncode
    sys.stdout.write(f"{json.dumps(result, indent=1)[:3000]}\n{write_result(arguments.name, result)}\n")
    grows = abs(result["growth"]) > MOST_GROWTH
    return int(bool(result["wrong"] or result["lent_sessions"] or result["waiting"] or grows or server.returncode))


def soak(
    server: subprocess.Popen[str], direct: Direct, minutes: float, num_clients: int, max_batch: int
) -> dict[str, Any]:
    """Load a server that starts, and say what became of it."""
    assert server.stderr is not None
    ready = next(said for said in map(json.loads, server.stderr) if said["message"] == "ready")
    errors: list[str] = []
    log = threading.Thread(target=_watch, args=(server.stderr, errors), daemon=True)
    log.start()
    url = f"http://127.0.0.1:{ready['port']}"
    run = Soak(url, direct, 0 if max_batch == 1 else 2)
    ends = time.monotonic() + 60 * minutes
    clients = [threading.Thread(target=run.client, args=(number, ends)) for number in range(num_clients)]
    for client in clients:
        client.start()
    process, resident = psutil.Process(server.pid), []
    while any(client.is_alive() for client in clients):
        time.sleep(1)
        resident.append(process.memory_info().rss / 2**20)
    time.sleep(3)  # what clients left is dropped meanwhile
    metrics = httpx.get(f"{url}/metrics", timeout=60).text
    quarters = quarter_means(resident)
    return {
        "minutes": minutes,
        "clients": num_clients,
        "max_batch": max_batch,
        "seen": dict(sorted(run.seen.items())),
        "wrong": run.wrong,
        "errors_logged": errors,
        "requests": {
            name: float(value) for name, value in re.findall(r'cat_requests_total\{outcome="(\w+)"\} (\S+)', metrics)
        },
        "lent_sessions": float(re.findall(r"cat_sessions_lent\{.*\} (\S+)", metrics)[0]),
        "waiting": float(re.findall(r"^cat_queue_length (\S+)", metrics, re.MULTILINE)[0]),
        "quarter_means_mib": [round(mean) for mean in quarters],
        "growth": round(quarters[3] / quarters[1] - 1, 4),
        "resident_mib": [round(value) for value in resident[:: max(1, len(resident) // 200)]],
    }


def _watch(log: Any, errors: list[str]) -> None:
    for line in log:
        if json.loads(line)["level"] in ("error", "critical"):
            errors.append(line[:500])


if __name__ == "__main__":
    sys.exit(main())
