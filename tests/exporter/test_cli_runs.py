from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bundle_files import without_plans

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.plan_sets import plan_sets
from cat_pruning.bundle.schema import PlanSpec
from cat_pruning.checkpoints.checkpoint import find_checkpoint, load_transformer
from cat_pruning.dtype import DType
from cat_pruning.engines.builder import build
from cat_pruning.engines.builder.build import can_build
from cat_pruning.engines.builder.plan_builder import PlanReport
from cat_pruning.errors import BundleError, EngineError
from cat_pruning.exporter import cli
from cat_pruning.exporter.export import ExportConfig, default_targets, export
from cat_pruning.exporter.step_graph import trace_step
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.names import Target
from cat_pruning.step_io import Part

CatExport = Callable[..., tuple[int, str, list[str]]]

# ------------------------------------------------------------------ --out


def test_out_exists(cat_export: CatExport, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    for force in ([], ["--force"]):
        code, printed, errors = cat_export("--model", tiny_checkpoint, "--out", tmp_path / "photos", *force)
        assert (code, printed, len(errors)) == (2, "", 1)
        assert "photos has holiday.jpg, not listed by a bundle's manifest.json" in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", tiny_checkpoint.name]
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["holiday.jpg"]


def test_a_disk_that_becomes_full(
    cat_export: CatExport, tiny_checkpoint: Path, tmp_path: Path, small_disk: Callable[[int], Any]
) -> None:
    out = tmp_path / "outs" / "bundle"
    # Its trace is in the store then, where it could not be written; the transformer alone has nothing else to copy.
    transformer = load_transformer(find_checkpoint(str(tiny_checkpoint)).source, DType.FP32)
    trace_step(StepModule(transformer, family_of(transformer)))
    with small_disk(1 << 15):
        code, _, errors = cat_export("--model", tiny_checkpoint / "transformer", "--target", "onnx", "--out", out)
    assert (code, len(errors)) == (2, 1), errors
    assert re.search(r"^cat-export: disk full .*bundle needs about .* free on that disk; make room", errors[0])
    assert list(out.parent.iterdir()) == []


# ------------------------------------------------------------------ runs that end well, and runs that are killed


@pytest.mark.long
def test_a_good_run(cat_export: CatExport, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "outs" / "tiny"
    target = ["--target", "tensorrt_rtx"] if can_build("tensorrt_rtx") else ["--target", "onnx"]
    verify = ["--verify", "layers"] if importlib.util.find_spec("polygraphy") else ["--verify"]
    shapes = ["--resolution", "72x48", "--batch", "2"]  # `test_tensorrt_plans` has more of both
    code, printed, errors = cat_export(
        "--model", tiny_checkpoint, "--out", out, *verify, "--keep-ratio", "0.5", *shapes, *target
    )
    assert (code, errors) == (0, [])
    if can_build("tensorrt_rtx") and not torch.cuda.is_available():
        assert "plans are compared on the machine that runs them; there: cat-export --model " in printed
    for text in ("step.onnx", "step.onnx.data", "MACs of a step", "72x48-p2", "bound", "once per image"):
        assert text in printed
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    bundle = Bundle.open(out)
    for name in bundle.manifest.files:
        bundle.verified(name)
    assert [profile.name for profile in bundle.manifest.profiles] == ["72x48-p2"]
    assert bundle.manifest.geometry.text_length == 13 + 256
    assert [graph.file for graph in bundle.manifest.graphs] == ["prompt.onnx", "timestep.onnx", "step.onnx"]
    for graph in bundle.manifest.graphs:
        assert str(tmp_path) not in (out / graph.file).read_bytes().decode(errors="replace")

    again = cli._parser().parse_args(shlex.split(bundle.export_command())[1:])
    assert Path(again.model) == tiny_checkpoint
    assert (again.out, again.force, again.keep_ratio, again.no_guidance) == (out, True, 0.5, False)
    assert (again.resolution, again.batch) == ([(72, 48)], [2])
    assert again.text_length == 13 + 256
    assert again.target == (["tensorrt_rtx"] if can_build("tensorrt_rtx") else None)

    if can_build("tensorrt_rtx"):  # what is added later is what the export itself has built
        code, _, errors = cat_export("--add-plans", without_plans(out, tmp_path / "later"), *target)
        assert (code, errors) == (0, [])
        later = Bundle.open(tmp_path / "later")
        assert later.manifest.plans == bundle.manifest.plans != ()
        for plan in later.manifest.plans:
            size = later.verified(plan.file).stat().st_size
            assert abs(size / bundle.manifest.files[plan.file].size - 1) < 0.05
        (folder,) = (tmp_path / "later" / "plans").iterdir()
        assert [each.name for each in plan_sets(later.manifest.plans)] == [folder.name]


def test_killed_inside_any_stage_nothing_loads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What a process that is killed leaves is what lies on the disk at that moment: it is copied then."""
    out = tmp_path / "outs" / "out"
    left: dict[str, Path] = {}

    @contextlib.contextmanager
    def stage(title: str) -> Iterator[Callable[..., None]]:
        def killed(*progress: Any) -> None:
            name = f"{title} {bool(progress)}"
            if name not in left:
                left[name] = shutil.copytree(out.parent, tmp_path / f"{len(left)}")

        killed()
        yield killed

    export(ExportConfig(model=str(tiny_checkpoint), out=out, targets=(Target.ONNX,)), stage)
    assert {name.partition(" ")[0] for name in left} == {"Copy", "Load", "Trace", "Count", "Hash"}
    for name, parent in left.items():
        (path,) = parent.iterdir()
        assert ".out.partial-" in path.name, name
        for loaded in (path, parent / "out"):
            with pytest.raises(BundleError):
                Bundle.open(loaded)
    assert (path / "step.onnx.data").stat().st_size > 100_000
    Bundle.open(out)


def test_interrupted(cat_export: CatExport, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cat_pruning.exporter.export.load_transformer", interrupt)
    code, _, errors = cat_export("--model", tiny_checkpoint, "--out", tmp_path / "outs" / "bundle")
    assert (code, errors) == (130, ["cat-export: interrupted; nothing was left behind"])
    assert list((tmp_path / "outs").iterdir()) == []


# ------------------------------------------------------------------ --target tensorrt


@pytest.mark.parametrize("no_plugin", [[], ["--no-plugin"]])
def test_tensorrt_plans(
    cat_export: CatExport, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Any, no_plugin: list[str]
) -> None:
    """All but the builder itself, on a machine with TensorRT 11.4 and an H100."""
    jobs = []

    def run(command: list[str], *, input: str, **_: object) -> subprocess.CompletedProcess[str]:
        jobs.append(json.loads(input))
        Path(jobs[-1]["plan"]).write_bytes(b"a plan")
        return subprocess.CompletedProcess(command, 0, '{"engine_layers": 9, "engine_plugins": 5}', "")

    monkeypatch.setattr(build.subprocess, "run", run)
    monkeypatch.setattr(build, "tensorrt_library", lambda flavour: SimpleNamespace(__version__="11.4.0.106"))
    monkeypatch.setattr(build, "gpu_architecture", lambda: "sm90")
    out = tmp_path / "outs" / "tiny"
    shapes = ["--resolution", "64x64", "--resolution", "72x48", "--batch", "1", "--batch", "2", "--batch", "2"]
    code, printed, errors = cat_export(
        "--model", tiny_checkpoint, "--out", out, "--target", "tensorrt", *no_plugin, *shapes
    )
    assert (code, errors) == (0, [])
    token_ops = "function" if no_plugin else "plugin"
    assert f"TensorRT 11.4.0.106 plans for sm90; token operators: {token_ops}" in printed

    bundle = Bundle.open(out)
    assert [profile.name for profile in bundle.manifest.profiles] == ["64x64-p1", "64x64-p2", "72x48-p1", "72x48-p2"]
    assert [len(job["profiles"]) for job in jobs] == [2, 2, 8]  # prompts; and sizes, of full and of pruned steps
    plans = bundle.manifest.plans
    assert [plan.file for plan in plans] == [f"plans/tensorrt-11.4.0.106-sm90/{part}.plan" for part in Part]
    assert {(plan.flavour, plan.architectures, plan.token_ops) for plan in plans} == {
        ("tensorrt", ("sm90",), token_ops)
    }
    assert bundle.manifest.versions["tensorrt"] == "11.4.0.106"
    assert [sorted(job["plugin_nodes"]) for job in jobs] == [
        [], [], [] if no_plugin else ["TokenGather", "TokenScatter"]
    ]  # fmt: skip
    assert {job["timing_cache"] for job in jobs} == {f"{out}.cache/tensorrt-11.4.0.106-sm90.timing"}
    words = shlex.split(bundle.export_command())
    again = cli._parser().parse_args(words[1:])
    assert (again.target, again.no_plugin) == (["tensorrt"], bool(no_plugin))
    assert (again.resolution, again.batch) == ([(64, 64), (72, 48)], [1, 2])


@pytest.mark.parametrize("gpu", ["sm90", None])
def test_what_is_built_by_default(monkeypatch: Any, gpu: str | None) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: name == "tensorrt" or None)
    monkeypatch.setattr(build, "tensorrt_library", lambda flavour: SimpleNamespace(__version__="11.4.0.106"))
    monkeypatch.setattr(build, "gpu_architecture", lambda: gpu)
    assert default_targets() == ((Target.ONNX, Target.TENSORRT) if gpu else (Target.ONNX,))


# ------------------------------------------------------------------ plans that fail


@pytest.fixture
def failing_builder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """TensorRT-RTX builds the first graph's plan and refuses the second's; the plans that were asked for."""
    asked: list[str] = []

    def build_plan(spec: Any, onnx: Path, plan: Path, *arguments: Any) -> PlanReport:
        asked.append(onnx.name)
        plan.parent.mkdir(parents=True, exist_ok=True)
        plan.write_bytes(b"a plan")
        if len(asked) == 2:
            raise EngineError(f"TensorRT-RTX cannot build {onnx.name}: no")
        return PlanReport()

    spec = PlanSpec(
        part=Part.PROMPT,
        flavour="tensorrt_rtx",
        version="1.7",
        architectures=("sm80",),
        token_ops="function",
        file="plans/rtx/prompt.plan",
    )
    specs = tuple(spec.model_copy(update={"part": part, "file": f"plans/rtx/{part}.plan"}) for part in Part)
    monkeypatch.setattr("cat_pruning.exporter.plans.build_plan", build_plan)
    monkeypatch.setattr("cat_pruning.exporter.plans.plan_specs", lambda *given, **options: specs)
    return asked


@pytest.mark.long
def test_the_graphs_outlive_a_plan_that_fails(
    cat_export: CatExport,
    tiny_checkpoint: Path,
    tmp_path: Path,
    failing_builder: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("cat_pruning.exporter.plans.importer_findings", lambda path: ["TopK: K is 5000"])
    out = tmp_path / "bundle"
    code, printed, errors = cat_export("--model", tiny_checkpoint, "--target", "tensorrt_rtx", "--out", out)
    assert (code, printed) == (2, "")
    assert errors[-1] == (
        f"cat-export: TensorRT-RTX cannot build timestep.onnx: no; {out} was written without these plans and runs "
        "under ONNX Runtime or torch; to build it anew, give --force"
    )
    assert failing_builder == ["prompt.onnx", "timestep.onnx"]  # a plan of the step's alone would be of no use
    bundle = Bundle.open(out)
    assert bundle.manifest.plans == ()
    assert not [name for name in bundle.manifest.files if name.startswith("plans/")]
    assert not (out / "plans" / "rtx").exists()
    for name in bundle.manifest.files:
        bundle.verified(name)

    # What the importer may refuse is told before each build.
    assert [words for words in caplog.messages if "refused" in words] == [
        "prompt.onnx may be refused by TensorRT-RTX: TopK: K is 5000",
        "timestep.onnx may be refused by TensorRT-RTX: TopK: K is 5000",
    ]

    # With a bundle there, which may have plans, a failure changes nothing.
    failing_builder.clear()
    before = (out / "manifest.json").stat().st_mtime_ns
    code, printed, errors = cat_export("--model", tiny_checkpoint, "--target", "tensorrt_rtx", "--out", out, "--force")
    assert (code, errors[-1]) == (2, "cat-export: TensorRT-RTX cannot build timestep.onnx: no")
    assert (out / "manifest.json").stat().st_mtime_ns == before
