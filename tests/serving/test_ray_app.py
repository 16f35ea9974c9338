"""Ray Serve with two replicas on this machine, one of which is killed while it computes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'cat-pruning[ray]'")

import httpx2
import psutil
import yaml

from cat_pruning.errors import SettingsError

with warnings.catch_warnings():  # Ray's own, of pydantic and more
    warnings.simplefilter("ignore")
    from ray.serve.schema import ServeDeploySchema

    from cat_pruning.serving import ray_app

EXAMPLE = Path(__file__).parents[2] / "deploy" / "ray.yaml"
# Ray in a process of its own, which ends with its standard input.
RAY = """
import sys
import ray
from ray import serve
from cat_pruning.serving.ray_app import Arguments, deployment_of

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
arguments = Arguments.read({"bundles": sys.argv[1], "queue": sys.argv[4]})
serve.run(deployment_of(arguments).options(num_replicas=2).bind(arguments), route_prefix=sys.argv[3])
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""
KEY = "a secret"
pytestmark = pytest.mark.long  # the last test of them ends the cluster
SEEDS = range(4)
QUEUE = 8  # of each replica, and of the proxy


@dataclass
class Cluster:
    """Two replicas behind Ray's proxy."""

    address: str

    def ask(self, seed: int, **fields: Any) -> httpx2.Response:
        """The answer to a request of one image."""
        body = {"prompt": "a blue star", "num_inference_steps": 4, "seed": seed} | fields
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx2.post(f"{self.address}/v1/images/generations", json=body, headers=headers, timeout=120)

    def replicas(self) -> list[psutil.Process]:
        """The replicas' processes."""
        every = psutil.process_iter(["cmdline"])
        return [each for each in every if "ServeReplica:default:Images" in " ".join(each.info["cmdline"] or ())]


@pytest.fixture(scope="module")
def cluster(mini_bundle: Path) -> Iterator[Cluster]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "CAT_SERVE_API_KEY": KEY,
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", RAY, f"file://{mini_bundle}", str(port), "/mini", str(QUEUE)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout), process.communicate()[1]
        yield Cluster(f"http://127.0.0.1:{port}/mini")
    finally:
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def test_a_replica_is_killed_under_load(cluster: Cluster) -> None:
    """Every request is answered: with its picture, or with an error where its replica died."""
    first = {seed: cluster.ask(seed).raise_for_status().json()["data"][0] for seed in SEEDS}
    before = {replica: replica.cpu_times().user for replica in cluster.replicas()}
    assert len(before) == 2
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(cluster.ask, seed, num_inference_steps=20) for seed in (*SEEDS, *SEEDS)]
        while not (busy := [replica for replica in before if replica.cpu_times().user > before[replica] + 0.1]):
            time.sleep(0.01)
        busy[0].kill()
        asked += [pool.submit(cluster.ask, seed) for seed in SEEDS]
        answers = [request.result() for request in asked]
    lost = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in lost} == {500}  # those that the killed replica had begun
    assert len(lost) <= 2 * len(SEEDS)
    late = zip(SEEDS, answers[-len(SEEDS) :], strict=True)
    assert all(answer in lost or answer.json()["data"][0] == first[seed] for seed, answer in late)
    assert cluster.ask(0).json()["data"][0] == first[0]


def test_the_surface_is_the_same(cluster: Cluster) -> None:
    models = httpx2.get(f"{cluster.address}/v1/models")
    assert (models.status_code, models.json()["error"]["code"]) == (401, "invalid_api_key")  # below a prefix, too
    assert httpx2.get(f"{cluster.address}/health/ready").json() == {"status": "ready"}
    assert "<title>cat-pruning</title>" in httpx2.get(f"{cluster.address}/").text
    refused = cluster.ask(0, n=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert "," not in refused.headers["x-request-id"]
    lines = cluster.ask(0, stream=True, partial_images=1).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names == ["image_generation.partial_image", "image_generation.completed"]


def test_more_than_there_is_room_for(cluster: Cluster) -> None:
    with ThreadPoolExecutor(5 * QUEUE) as pool:
        answers = list(pool.map(cluster.ask, range(5 * QUEUE)))
    rejected = [answer for answer in answers if answer.status_code != 200]
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in rejected} == {(429, "5")}
    assert len(rejected) < len(answers)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "bundles: Field required; the arguments are bundles, engine"),
        ({"bundles": "a", "api_key": "secret"}, "api_key: Extra inputs are not permitted"),
        ({"bundles": "a", "queue": "many"}, "queue: Input should be a valid integer"),
        ({"bundles": "a", "queue": "0"}, "queue=0: expected"),
        ({"bundles": "a,b/a"}, "two bundles have one name"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(said)):
        ray_app.app(arguments)


def test_a_replica_that_only_fails_is_unhealthy() -> None:
    check = ray_app.Images.func_or_class.check_health
    check(SimpleNamespace(_service=SimpleNamespace(is_live=True)))
    with pytest.raises(RuntimeError, match="one batch after another fails"):
        check(SimpleNamespace(_service=SimpleNamespace(is_live=False)))


def test_arguments_of_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"bundles": "a,/b,s3://bucket/c", "public_key": "key.pem", "queue": "7", "max_wait_ms": "2.5"}
    arguments = ray_app.Arguments.read(given)
    assert arguments.bundles == (str(tmp_path / "a"), "/b", "s3://bucket/c")
    config = arguments.config((Path("a"), Path("b"), Path("c")))
    assert (config.public_key, config.queue, config.max_wait_ms) == (tmp_path / "key.pem", 7, 2.5)
    assert config.api_key is None


def test_the_example() -> None:
    example = ServeDeploySchema.model_validate(yaml.safe_load(EXAMPLE.read_text()))
    (application,) = example.applications
    (deployment,) = application.deployments
    assert application.import_path == f"{ray_app.__name__}:{ray_app.app.__name__}"
    assert deployment.name == ray_app.Images.name
    assert ray_app.Arguments.read(application.args).queue == application.args["queue"]
