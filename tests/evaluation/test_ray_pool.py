"""`--ray`: real workers of Ray on this machine, some of which are killed; and cat-eval and cat-tune by them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'cat-pruning[ray]'")

import psutil
import torch
from pool_workers import Plain, Recipe, Unreadable, count, die, die_after_two, fail, meet
from safetensors.torch import load_file

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.schedules import read_schedules
from cat_pruning.errors import BundleError, CatError, EngineError, InstallationError, ServerError, SettingsError
from cat_pruning.evaluation import cli
from cat_pruning.evaluation.cluster import Cluster
from cat_pruning.evaluation.place import IMAGES, RESULTS, TOKENS
from cat_pruning.evaluation.pool import Pool
from cat_pruning.tuning import cli as tuning_cli

with warnings.catch_warnings():  # Ray's own
    warnings.simplefilter("ignore")
    from cat_pruning.evaluation import ray_pool

# Ray in a process of its own, which ends with its standard input.
RAY = """
import sys
import ray

context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""
# The tests of a cluster: the last of them ends it.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
PLAIN = Recipe()
QUICK = [
    *("--quick", "--prompts", "scenes:4", "--batch", "1", "--steps", "5", "--full-steps", "2"),
    *("--guidance-scale", "3", "--methods", "cat,forecast", "--resolution", "64x64", "--engine", "onnxruntime"),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    here = [str(Path(__file__).parents[1] / "fixtures"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(here),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RAY],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()
        os.environ["RAY_AUTH_MODE"] = "disabled"
        yield line.strip()
    finally:
        os.environ.pop("RAY_AUTH_MODE", None)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


Connect = Callable[..., AbstractContextManager[Pool[Plain]]]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def connect(address: str, said: list[str]) -> Connect:
    def connected(recipe: Any = PLAIN, workers: int | None = 2) -> Any:
        return ray_pool.connected(recipe, Cluster(address=address, workers=workers), lambda what: None, said.append)

    return connected


def hosts() -> list[psutil.Process]:
    """The workers' processes."""
    every = psutil.process_iter(["cmdline"])
    return [each for each in every if "ray::Host" in " ".join(each.info["cmdline"] or ())]


def assert_no_host_is_left() -> None:
    """Ray ends processes when it comes to it."""
    _, alive = psutil.wait_procs(hosts(), timeout=60)
    assert not alive


def test_every_piece_is_told_once_and_in_order(connect: Connect, tmp_path: Path) -> None:
    told: dict[int, list[Any]] = {}
    with connect() as pool:
        assert (pool.size, pool.about.engine) == (2, "torch")
        pool.run(meet, [tmp_path / "a", tmp_path / "b"], lambda number, piece: told.setdefault(piece, []))
        assert len(told) == len(hosts()) == 2  # processes, at the same time
        told.clear()
        pool.run(count, [(5, 0.01)] * 6, lambda number, piece: told.setdefault(number, []).append(piece))
        pool.run(count, [], lambda number, piece: told.clear())
    assert [told[number] for number in range(6)] == [list(range(5))] * 6
    assert_no_host_is_left()


def test_a_worker_that_is_killed_is_replaced(connect: Connect, said: list[str], tmp_path: Path) -> None:
    told: list[Any] = []
    with connect(workers=1) as pool:
        pool.run(die_after_two, [tmp_path / "died"], lambda number, piece: told.append(piece))
    assert told == [0, 1, 2, 3]
    (line,) = said
    assert re.fullmatch(r"a worker on .+ \(.+\) died; its batch is begun anew by another \(.+\)", line)


def test_workers_that_all_die_are_told(connect: Connect, said: list[str]) -> None:
    with connect(workers=1) as pool, pytest.raises(ServerError, match=r"3 workers .* died one after another .*memory"):
        pool.run(die, ["job"], lambda number, piece: None)
    assert len(said) == 2
    with pytest.raises(ServerError, match="3 workers of the cluster died"), connect(Recipe(fails="dies"), 1):
        pass


def test_an_error_of_a_job_is_the_same_here(connect: Connect) -> None:
    told: list[Any] = []
    with connect(workers=1) as pool:
        with pytest.raises(EngineError) as found:
            pool.run(fail, ["ours"], lambda number, piece: told.append(piece))
        assert re.fullmatch(r"worker on \S+ \([\d.]+\): the image is not finite; take bf16", str(found.value))
        with pytest.raises(ZeroDivisionError, match="by nobody"):
            pool.run(fail, ["theirs"], lambda number, piece: told.append(piece))
        with pytest.raises(ValueError, match="it is of another version"):
            pool.run(fail, [Unreadable()], lambda number, piece: told.append(piece))
    assert told == ["one", "one"]


def test_an_error_of_the_tool_ends_the_workers(connect: Connect) -> None:
    def stop(number: int, piece: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), connect() as pool:
        pool.run(count, [(1000, 1.0)] * 2, stop)
    assert_no_host_is_left()


@pytest.mark.parametrize(
    ("recipe", "kind", "says"),
    [
        (Recipe(fails="bundle"), BundleError, r"worker on .*: /nowhere is no bundle; export one"),
        ("other version", InstallationError, r"worker on .*: cat-pruning is .*, expected 9\.9; install the same"),
    ],
)
def test_what_a_worker_cannot_load_is_told(
    connect: Connect, recipe: Any, kind: type[CatError], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recipe == "other version":
        monkeypatch.setattr("cat_pruning.__version__", "9.9")
        recipe = PLAIN
    with pytest.raises(kind, match=says), connect(recipe):
        pass


def test_workers_that_differ_are_told(connect: Connect, tmp_path: Path) -> None:
    with (
        connect(Recipe(marks=tmp_path, others="onnxruntime")) as pool,
        pytest.raises(EngineError, match=r"the worker on .* has another engine onnxruntime, not torch, .*--engine"),
    ):
        pool.run(count, [(2, 0.5)] * 300, lambda number, piece: None)


def test_more_workers_than_there_is_room_for(connect: Connect) -> None:
    with pytest.raises(SettingsError, match="--ray-workers 3: the cluster has 2 CPUs"), connect(workers=3):
        pass


def evaluate(bundle: Path, out: Path, *options: Any) -> int:
    return cli.main([str(bundle), "--out", str(out), *QUICK, *map(str, options)])


def results(out: Path) -> dict[Any, Any]:
    """All of an evaluation but the seconds."""
    lines = map(json.loads, (out / RESULTS).read_text().splitlines())
    return {(each["candidate"], each["prompt"], each["seed"]): each["scores"] for each in lines}


def pictures(out: Path) -> dict[Path, bytes]:
    found = [path for folder in (IMAGES, TOKENS) for path in (out / folder).rglob("*.png")]
    return {path.relative_to(out): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def local(mini_bundle: Path, quantized_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    assert evaluate(mini_bundle, out, "--quantized", quantized_bundle.path) == 0
    return out


@pytest.mark.slow
def test_cat_eval_finds_the_same_though_a_worker_is_killed(
    mini_bundle: Path,
    quantized_bundle: Bundle,
    local: Path,
    tmp_path: Path,
    address: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To the bit, pictures too, a quantized bundle's as well; half of it was done here already."""
    out = tmp_path / "out"
    shutil.copytree(local, out)
    kept = (out / RESULTS).read_text().splitlines(keepends=True)[:5]
    (out / RESULTS).write_text("".join(kept))

    def kill_one() -> None:
        while len((out / RESULTS).read_text().splitlines()) == len(kept):
            time.sleep(0.02)
        max(hosts(), key=lambda host: host.cpu_times().user).kill()  # the other one may still be loading

    killer = Thread(target=kill_one)
    killer.start()
    quantized = ("--quantized", quantized_bundle.path)
    assert evaluate(mini_bundle, out, *quantized, "--ray", address, "--ray-workers", "2") == 0
    killer.join()
    assert "died; its batch is begun anew by another" in " ".join(capsys.readouterr().err.split())
    assert (out / RESULTS).read_text().startswith("".join(kept))
    assert len((out / RESULTS).read_text().splitlines()) == len(results(out)) == len(results(local))
    assert results(out) == results(local)
    assert {key[0] for key in results(out)} > {"int8-full-5", "int8-cat-5-0.3", "int8-forecast-5-0.3"}
    assert pictures(out) == pictures(local)


@pytest.mark.slow
def test_an_interruption_keeps_what_is_done(mini_bundle: Path, tmp_path: Path, address: str) -> None:
    """Ctrl-C, which a terminal sends to the whole group of processes."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cat_pruning.evaluation.cli", str(mini_bundle), "--out", str(out), *QUICK]
    process = subprocess.Popen(
        [*command, "--prompts", "scenes:64", "--ray", address, "--ray-workers", "1"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (out / RESULTS).exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("cat-eval: interrupted; what is done is kept")
    assert results(out)
    assert_no_host_is_left()


@pytest.mark.slow
def test_cat_tune_finds_the_same(mini_bundle: Path, tmp_path: Path, address: str) -> None:
    options = ["--guidance-scale", "3", "--steps", "6", "--full", "4,3", "--prompts", "scenes:4", "--batch", "2"]
    options += ["--measure", "scenes:2", "--engine", "onnxruntime", "--resolution", "64x64", "--no-peers"]
    found = []
    for name, more in (("here", []), ("there", ["--ray", address, "--ray-workers", "2"])):
        bundle = tmp_path / name
        shutil.copytree(mini_bundle, bundle, copy_function=os.link)
        assert tuning_cli.main([str(bundle), *options, *more]) == 0
        recordings = [load_file(path) for path in sorted(tmp_path.glob(f"{name}.tune/*.safetensors"))]
        found.append((read_schedules(Bundle.open(bundle)), recordings))
    (here, recorded), (there, others) = found
    assert there == here
    assert len(recorded) == len(others) == 2
    for one, other in zip(recorded, others, strict=True):
        assert all(torch.equal(other[key], tensor) for key, tensor in one.items())
