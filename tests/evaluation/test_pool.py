"""Jobs that are done elsewhere: the same results in whatever order, and what a cluster has room for. Without Ray."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pool_workers import Elsewhere

from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.errors import BundleError, InstallationError, ServerError, SettingsError
from cat_pruning.evaluation import cli
from cat_pruning.evaluation.about import About, QuantizedBundle
from cat_pruning.evaluation.arguments import cluster_of, parse
from cat_pruning.evaluation.candidates import FULL, Candidate
from cat_pruning.evaluation.cluster import Cluster, Share
from cat_pruning.evaluation.evaluate import evaluate
from cat_pruning.evaluation.metrics import Metric, Metrics
from cat_pruning.evaluation.place import IMAGES, RESULTS, TOKENS
from cat_pruning.evaluation.pool import LocalPool, pool_of
from cat_pruning.evaluation.results import ResultStore, RunSpec
from cat_pruning.evaluation.worker import Evaluator, Generator
from cat_pruning.models.prompts import Prompt
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import never_pruned
from cat_pruning.tuning.arguments import parse as parse_tune

PROMPTS = [Prompt(text=text, scene=None) for text in ("a red circle", "a blue star", "a white ring")]


def candidate(method: str, steps: int, prompts: int, settings: PruneSettings) -> Candidate:
    return Candidate(
        method=method,
        steps=steps,
        keep_ratio=1.0 if method == FULL else 0.5,
        sampled_steps=steps,
        full_steps=2,
        macs_linear=1,
        macs_all=1,
        settings=settings.to_dict(),
        engine="onnxruntime",
        prompts=prompts,
    )


PRUNED = PruneSettings(full_steps=2, keep_ratio=0.5)
SPEC = RunSpec(
    bundle="mini",
    bundle_sha256="0" * 64,
    engine="onnxruntime",
    prompts=tuple(prompt.text for prompt in PROMPTS),
    prompts_source="three.txt",
    seeds=1,
    batch=2,
    sheet=1,
    height=32,
    width=48,
    guidance_scale=3.0,
    metrics=("psnr_db", "latents_error"),
    settings=PRUNED.to_dict(),
    candidates=(
        *(candidate(FULL, steps, 3, never_pruned(PRUNED, steps)) for steps in (4, 3)),
        *(candidate("cat", steps, prompts, PRUNED) for steps, prompts in ((4, 3), (3, 2))),
    ),
    machine={},
)


@pytest.fixture
def evaluator(engines: dict[str, StepEngine], drop_in: Any) -> Evaluator:
    pipe, nothing = drop_in(engines["onnxruntime"]), Any
    generator = Generator(
        pipe=pipe, transformer=pipe.transformer, at_edm=nothing, text_arguments={"max_sequence_length": 24}
    )
    about: Any = None
    return Evaluator(about=about, generator=generator, metrics=Metrics([Metric.PSNR, Metric.LATENTS], PROMPTS))


def found(out: Path) -> tuple[dict[Any, Any], dict[Path, bytes]]:
    """An evaluation's scores, and its pictures."""
    lines = [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]
    scores = {(each["candidate"], each["prompt"]): each["scores"] for each in lines}
    assert len(scores) == len(lines)
    pictures = [path for folder in (IMAGES, TOKENS) for path in (out / folder).rglob("*.png")]
    return scores, {path.relative_to(out): path.read_bytes() for path in pictures}


def test_an_evaluation_is_the_same_wherever_it_is_done(evaluator: Evaluator, tmp_path: Path) -> None:
    """To the bit: all of it here, or some of it here and the rest elsewhere."""
    done: Counter[str] = Counter()

    def run(pool: Any, out: Path) -> None:
        done.clear()
        evaluate(ResultStore(out, SPEC), PROMPTS, pool, lambda one, count: done.update({one.key: count}))
        assert done == {"full-4": 3, "full-3": 3, "cat-4-0.5": 3, "cat-3-0.5": 2}

    run(LocalPool(evaluator), tmp_path / "here")
    here = found(tmp_path / "here")
    assert len(here[0]) == 11
    assert len(here[1]) == 4 + 2  # images, and the maps of what prunes
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere", ignore=shutil.ignore_patterns("cat-3*"))
    lines = (tmp_path / "here" / RESULTS).read_text().splitlines(keepends=True)
    (tmp_path / "elsewhere" / RESULTS).write_text("".join(lines[:5]))  # a full run's, and one candidate's of it
    run(Elsewhere(evaluator), tmp_path / "elsewhere")
    assert found(tmp_path / "elsewhere") == here


def bundle(digest: str) -> Any:
    return SimpleNamespace(path=Path("/shared/mini"), manifest=SimpleNamespace(digest=digest))


def test_workers_that_have_something_else(evaluator: Evaluator) -> None:
    pipe = evaluator.generator.pipe
    about = About.of(bundle("0"), pipe)
    assert (about.engine, about.steps, about.guidance_scale) == ("onnxruntime", 28, 7.0)
    assert about.differs(about) == ""
    assert about.differs(About.of(bundle("1"), pipe)) == "digest 1, not 0"
    about.check(bundle("0"))
    with pytest.raises(
        BundleError, match=r"the workers have another bundle than /shared/mini is here: .* is 0, expected 1"
    ):
        about.check(bundle("1"))
    int8, other = (QuantizedBundle(name="int8", digest=digest, engine="onnxruntime") for digest in ("2", "3"))
    both = About.of(bundle("0"), pipe, [int8])
    both.check(bundle("0"), [bundle("2")])
    with pytest.raises(BundleError, match=r"another bundle than .*: its digest is 2, expected 3"):
        both.check(bundle("0"), [bundle("3")])
    assert both.differs(About.of(bundle("0"), pipe, [other])) == "digest of int8 3, not 2"


@pytest.mark.parametrize(
    ("machines", "workers", "share", "words"),
    [
        ([{"CPU": 8.0, "memory": 1e9}], None, (1, 0, 8), "8 CPUs"),
        ([{"CPU": 8.0}, {"CPU": 4.0}, {"memory": 1e9}], None, (2, 0, 4), "4 CPUs"),  # one of each machine
        ([{"CPU": 8.0}, {"CPU": 5.0}], 4, (4, 0, 2), "2 CPUs"),
        ([{"CPU": 8.0}, {"CPU": 1.0}], 9, (9, 0, 1), "1 CPU"),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 8.0}], None, (8, 1, 4), "1 GPU and 4 CPUs"),  # one of each GPU
        ([{"CPU": 64.0, "GPU": 8.0}], 3, (3, 1, 4), "1 GPU and 4 CPUs"),
        ([{"CPU": 4.0, "GPU": 2.0}, {"GPU": 1.0}], None, (3, 1, 0), "1 GPU"),
    ],
)
def test_a_cluster_is_divided(
    machines: list[dict[str, float]], workers: int | None, share: tuple[int, int, int], words: str
) -> None:
    found = Share.of(machines, workers)
    assert (found.workers, found.gpus, found.cpus) == share
    assert str(found) == words


def test_what_a_cluster_has_no_room_for() -> None:
    with pytest.raises(SettingsError, match="--ray-workers 9: the cluster has 8 GPUs, one or more for each worker"):
        Share.of([{"CPU": 64.0, "GPU": 8.0}], 9)
    with pytest.raises(SettingsError, match="--ray-workers 9: the cluster has 8 CPUs"):
        Share.of([{"CPU": 8.0}], 9)
    with pytest.raises(ServerError, match="no GPU and no CPU in 1 machines; start its workers"):
        Share.of([{"memory": 1e9}], None)


@pytest.mark.parametrize("address", ["auto", "local", "10.0.0.1:6379", "ray://head.cluster:10001", "[::1]:6379"])
def test_an_address_is_one(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cat_pruning.evaluation.arguments.require", lambda *names: None)
    for arguments in (
        parse(["b", "--out", "o", "--ray", address]),
        parse_tune(["b", "--ray", address, "--ray-workers", "2"]),
    ):
        cluster = cluster_of(arguments)
        assert cluster == Cluster(address=address, workers=arguments.ray_workers)
    assert cluster_of(parse(["b", "--out", "o"])) is None


@pytest.mark.parametrize("address", ["", "head", "10.0.0.1", "http://head:1", "ray://", "ray://head", "head:port"])
def test_no_address(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["b", "--out", "o", "--ray", address])
    said = f"argument --ray: '{address}': expected auto, local, HOST:PORT or ray://HOST:PORT"
    assert said in capsys.readouterr().err


def test_nothing_answers_and_it_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for a minute; and it is not imported."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    says = r"--ray {}: nothing answers there \(Connection refused\); give the address that ray start --head said"
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(ServerError, match=says.format(address)):
            Cluster(address=address).check()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ServerError, match=says.format(f"127.0.0.1:{port}")):
        Cluster(address="auto").check()
    Cluster(address="local").check()
    for address in ("127.0.0.1:99999", "a..b:1", "nowhere.invalid:1"):
        with pytest.raises(ServerError, match=re.escape(f"--ray {address}: nothing answers there (")):
            Cluster(address=address).check()


def test_workers_are_of_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(tmp_path / "no-bundle"), "--out", str(tmp_path / "out"), "--ray-workers", "2"]) == 2
    assert capsys.readouterr().err == (
        "cat-eval: --ray-workers without --ray: they are of a cluster; give --ray ADDRESS too\n"
    )


def test_ray_that_is_missing_is_told_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cat_packages(), "ray", ("ray_is_not_here",))
    assert cli.main([str(tmp_path / "no-bundle"), "--out", str(tmp_path / "out"), "--ray", "auto"]) == 2
    said = "cat-eval: --ray needs ray_is_not_here, not installed here; pip install 'cat-pruning[ray]'\n"
    assert capsys.readouterr().err == said
    with pytest.raises(InstallationError, match="ray_is_not_here"):
        cluster_of(parse_tune(["b", "--ray", "auto"]))


def cat_packages() -> dict[str, tuple[str, ...]]:
    from cat_pruning.installation import PACKAGES

    return PACKAGES


def test_without_a_cluster_the_worker_is_here() -> None:
    worker: Any = object()
    waited: list[str] = []
    with pool_of(lambda: worker, None, waited.append, waited.append) as pool:
        assert isinstance(pool, LocalPool)
        assert pool.worker is worker
    assert waited == ["Load the bundle …"]
