from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from cat_pruning.bundle.bundle import Bundle, new_bundle
from cat_pruning.bundle.profiles import PlanProfile, plan_profiles, profile_spec
from cat_pruning.bundle.schema import Geometry, PlanSpec, TokenOps
from cat_pruning.engines.builder import build, plan_builder
from cat_pruning.engines.builder.build import build_plan, can_build, can_build_refittable, plan_specs
from cat_pruning.engines.builder.plan_builder import PlanJob, PlanReport
from cat_pruning.engines.plan_choice import runs_on
from cat_pruning.errors import EngineError, OutputError
from cat_pruning.exporter.export import graph_spec
from cat_pruning.names import FLAVOURS, Flavour
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part

needs_rtx = pytest.mark.skipif(
    not can_build("tensorrt_rtx"), reason="TensorRT-RTX is not installed; install '.[tensorrt-rtx]'"
)

RTX = PlanSpec(
    part=Part.STEP,
    flavour="tensorrt_rtx",
    version="1.7",
    architectures=("sm80",),
    token_ops="function",
    file="rtx.plan",
)


def shapes_of(bundle: Bundle) -> list[PlanProfile]:
    """The profiles of the plan of step.onnx."""
    manifest = bundle.manifest
    return plan_profiles(manifest.graph(Part.STEP), manifest.profiles, manifest.geometry.patch_size)


def fake_builder(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """The builder's process runs `program` instead."""
    real = subprocess.run

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[1:] == ["-m", "cat_pruning.engines.builder.plan_builder"]
        return real([sys.executable, "-c", program], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(build.subprocess, "run", run)


@needs_rtx
def test_the_bundle_has_the_plans_that_its_manifest_lists(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle)
    plans = bundle.manifest.plans
    step = {"attention": "decomposable", "score_bytes": plans[-1].score_bytes}  # in fp32
    expected = plan_specs("tensorrt_rtx")
    assert plans == (*expected[:-1], expected[-1].model_copy(update=step))
    (profile,) = bundle.manifest.profiles
    heads, rows = bundle.manifest.transformer_config["num_attention_heads"], profile.num_tokens + profile.text_length
    assert plans[-1].score_bytes == profile.batch * heads * rows**2 * 2
    assert [plan.part for plan in plans] == list(Part)
    assert len({plan.file for plan in plans}) == 3
    for plan in plans:
        assert plan.version in plan.file
        assert plan.token_ops == "function"
        assert bundle.manifest.versions["tensorrt_rtx"] == plan.version
        weights = (mini_bundle / f"{plan.part.onnx}.data").stat().st_size
        assert bundle.verified(plan.file).stat().st_size == bundle.manifest.files[plan.file].size > weights / 2


@pytest.mark.long
@needs_rtx
@pytest.mark.parametrize("part", list(Part))
@pytest.mark.parametrize("kind", ["sd3.5", "pixart", "flux-dev"])
def test_every_family_can_be_built(tiny_export: Any, tmp_path: Path, part: Part) -> None:
    """In fp32, for which there is no fused attention kernel. FLUX, whose positions have no table, for 1024 tokens."""
    family, size = tiny_export.step.family, (512, 512) if tiny_export.kind == "flux-dev" else (80, 64)
    geometry = Geometry(pixels_per_latent=8, patch_size=2, latent_channels=4, max_latent_size=None, text_length=7)
    guidance = family.batched_guidance
    profile = profile_spec(*size, 1, geometry=geometry, settings=PruneSettings(num_clusters=4), guidance=guidance)
    assert profile.num_tokens == (1024 if tiny_export.kind == "flux-dev" else 20)
    assert geometry.patch_size == family.patch_size
    graph = graph_spec(part, tiny_export.graphs[part])
    profiles = plan_profiles(graph, [profile], geometry.patch_size)
    assert len(profiles) == (2 if part is Part.STEP else 1)
    job = PlanJob(
        flavour="tensorrt_rtx",
        onnx=str(tiny_export.directory / graph.file),
        plan=str(tmp_path / "tiny.plan"),
        profiles=profiles,
        plugin_nodes={},
        timing_cache=None,
        architectures=RTX.architectures,
    )
    plan_builder.build(job)  # what `build_plan` begins a process for, which would take longer than the build
    assert Path(job.plan).stat().st_size > (tiny_export.directory / f"{part.onnx}.data").stat().st_size / 2


@needs_rtx
@pytest.mark.parametrize("problem", ["not onnx", "operator unknown", "no weights"])
def test_a_graph_that_cannot_be_built(mini_bundle: Path, tmp_path: Path, problem: str) -> None:
    step_onnx = tmp_path / "step.onnx"
    if problem == "not onnx":
        step_onnx.write_bytes(b"not a model")
    elif problem == "no weights":
        shutil.copyfile(mini_bundle / "step.onnx", step_onnx)
    else:
        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
        node = onnx.helper.make_node("Frobnicate", ["x"], ["y"], domain="nobody")
        graph = onnx.helper.make_graph([node], "g", [value], [output])
        onnx.save(onnx.helper.make_model(graph), step_onnx)
    with pytest.raises(EngineError, match=r"^TensorRT-RTX cannot build step\.onnx: \S") as caught:
        build_plan(RTX, step_onnx, tmp_path / "plans" / "rtx.plan", shapes_of(Bundle.open(mini_bundle)))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


@needs_rtx
def test_profiles_that_the_graph_cannot_have(mini_bundle: Path, tmp_path: Path) -> None:
    shapes = [{**shapes, "noise": ((2, 3, 5, 7),) * 3} for shapes in shapes_of(Bundle.open(mini_bundle))]
    with pytest.raises(EngineError, match=r"^TensorRT-RTX cannot build step\.onnx: \S"):
        build_plan(RTX, mini_bundle / "step.onnx", tmp_path / "rtx.plan", shapes)


@pytest.mark.long
@needs_rtx
def test_a_disk_that_becomes_full_while_the_plan_is_written(
    export_tiny: Callable[[str], Any], tmp_path: Path, small_disk: Callable[[int], Any]
) -> None:
    out, tiny = tmp_path / "outs" / "bundle", export_tiny("sd3")
    dims = tiny.step.family.dims((4, 4), batch=1, text_length=7, num_kept=16)
    one = {name: dims.named(spec.shape) for name, spec in tiny.graphs[Part.STEP].inputs.items()}
    shapes = [{name: (shape, shape, shape) for name, shape in one.items()}]
    with (
        pytest.raises(OutputError, match=r"^disk full \(.*rtx\.plan"),
        new_bundle(out, force=False, needed_bytes=1) as writer,
        small_disk(1 << 14),
    ):
        build_plan(RTX, tiny.directory / "step.onnx", writer.path / "rtx.plan", shapes)
    assert list(out.parent.iterdir()) == []


def test_a_builder_that_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_builder(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(EngineError, match=r"ended with -9 \(killed: probably out of memory") as caught:
        build_plan(RTX, Path("step.onnx"), tmp_path / "plans" / "rtx.plan", [])
    assert str(caught.value).startswith("TensorRT-RTX cannot build step.onnx: its process ended")


def test_a_builder_that_crashes_says_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_builder(monkeypatch, "import sys; print('first\\nlast words\\n', file=sys.stderr); sys.exit(3)")
    with pytest.raises(
        EngineError, match=r"^TensorRT-RTX cannot build step\.onnx: its process ended with 3: last words$"
    ):
        build_plan(RTX, Path("step.onnx"), tmp_path / "rtx.plan", [])


# ------------------------------------------------------------------ what is built where


def installed(monkeypatch: pytest.MonkeyPatch, *, architecture: str | None) -> None:
    """TensorRT 11.4 and a GPU, as far as they are asked before a build."""
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(build, "tensorrt_library", lambda flavour: SimpleNamespace(__version__="11.4.0.106"))
    monkeypatch.setattr(build, "gpu_architecture", lambda: architecture)
    monkeypatch.setattr(build, "missing_gpu", lambda: "Found no NVIDIA driver on your system.")


@pytest.mark.parametrize("token_ops", ["plugin", "function"])
def test_plans_of_tensorrt_are_this_gpus(monkeypatch: pytest.MonkeyPatch, token_ops: TokenOps) -> None:
    installed(monkeypatch, architecture="sm90")
    assert can_build("tensorrt")
    specs = plan_specs("tensorrt", token_ops)
    assert [spec.part for spec in specs] == list(Part)
    assert {(spec.version, spec.architectures, spec.token_ops) for spec in specs} == {
        ("11.4.0.106", ("sm90",), token_ops)
    }
    assert specs[-1].file == "plans/tensorrt-11.4.0.106-sm90/step.plan"


@needs_rtx
def test_plans_of_tensorrt_rtx_are_for_several() -> None:
    (version,) = {spec.version for spec in plan_specs("tensorrt_rtx")}
    assert plan_specs("tensorrt_rtx")[-1].file == f"plans/tensorrt_rtx-{version}-sm80-and-later/step.plan"


@needs_rtx
def test_plans_of_fp8_are_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = plan_specs("tensorrt_rtx", fp8=True)[-1]
    assert spec.file.endswith("-sm89-sm120/step.plan")
    for architecture, expected in (("sm80", False), ("sm86", False), ("sm89", True), ("sm120", True), ("sm121", True)):
        assert runs_on(spec, architecture) is expected
    installed(monkeypatch, architecture="sm86")
    with pytest.raises(EngineError, match="this GPU is sm86, and products of fp8 take sm89 or later; export with --"):
        plan_specs("tensorrt", fp8=True)
    installed(monkeypatch, architecture="sm90")
    assert {each.architectures for each in plan_specs("tensorrt", fp8=True)} == {("sm90",)}


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, architecture=None)
    assert not can_build("tensorrt")
    assert can_build("tensorrt_rtx")
    with pytest.raises(EngineError) as caught:
        plan_specs("tensorrt", "plugin")
    assert str(caught.value) == (
        "--target tensorrt: TensorRT measures its kernels on the GPU that will run them, and torch can use none here "
        "(Found no NVIDIA driver on your system.); run it on that machine, or --target tensorrt_rtx, which builds "
        "anywhere"
    )


def test_refittable_plans_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, architecture=None)
    assert not can_build_refittable("tensorrt_rtx")
    with pytest.raises(
        EngineError, match=r"--refittable --target tensorrt_rtx: .*no NVIDIA driver.*ONNX Runtime takes adapters"
    ):
        plan_specs("tensorrt_rtx", refittable=True)
    installed(monkeypatch, architecture="sm89")
    assert can_build_refittable("tensorrt_rtx")
    for flavour in ("tensorrt", "tensorrt_rtx"):
        assert all(spec.refittable for spec in plan_specs(flavour, refittable=True))  # type: ignore[arg-type]
        assert not any(spec.refittable for spec in plan_specs(flavour))  # type: ignore[arg-type]


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_tensorrt_rtx_builds_none_without_a_gpu(mini_bundle: Path, tmp_path: Path) -> None:
    """What `can_build_refittable` says of it. Whatever the graph: this one has no attention."""
    manifest = Bundle.open(mini_bundle).manifest
    spec = plan_specs("tensorrt_rtx")[0].model_copy(update={"refittable": True})
    shapes = plan_profiles(manifest.graph(Part.PROMPT), manifest.profiles, manifest.geometry.patch_size)
    with pytest.raises(EngineError, match=r"cannot build prompt\.onnx: .*CUDA_SUCCESS"):
        build_plan(spec, mini_bundle / "prompt.onnx", tmp_path / "prompt.plan", shapes)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_not_installed(monkeypatch: pytest.MonkeyPatch, flavour: Flavour) -> None:
    installed(monkeypatch, architecture="sm90")

    def broken(flavour: Flavour) -> None:
        raise EngineError("it cannot be imported; pip install it")

    monkeypatch.setattr(build, "tensorrt_library", broken)
    assert not can_build(flavour)
    with pytest.raises(EngineError, match=rf"^--target {flavour}: it cannot be imported; pip install it$"):
        plan_specs(flavour)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert not can_build(flavour)


# ------------------------------------------------------------------ what the builder is asked, and what it tells

TENSORRT = RTX.model_copy(update={"flavour": "tensorrt", "architectures": ("sm90",), "token_ops": "plugin"})


@pytest.mark.parametrize(
    ("spec", "timings"),
    [
        (TENSORRT, True),
        (TENSORRT.model_copy(update={"token_ops": "function", "refittable": True}), True),
        (RTX, False),
    ],
)
def test_the_job(
    monkeypatch: pytest.MonkeyPatch, mini_bundle: Path, tmp_path: Path, spec: PlanSpec, timings: bool
) -> None:
    keep = f"import pathlib, sys; pathlib.Path({str(tmp_path / 'job')!r}).write_text(sys.stdin.read())"
    fake_builder(monkeypatch, f"{keep}; print('{{}}')")
    profiles: list[PlanProfile] = [{"noise": ((1, 2), (1, 2), (1, 2))}]
    build_plan(spec, mini_bundle / "step.onnx", tmp_path / "a" / "step.plan", profiles, tmp_path / "timings")
    job = json.loads((tmp_path / "job").read_text())
    assert job["flavour"] == spec.flavour
    assert job["profiles"] == [{"noise": [[1, 2]] * 3}]
    assert sorted(job["plugin_nodes"]) == (["TokenGather", "TokenScatter"] if spec.token_ops == "plugin" else [])
    assert job["timing_cache"] == (str(tmp_path / "timings") if timings else None)
    assert job["refittable"] == spec.refittable


@pytest.mark.parametrize("plugins", [98, 0])
def test_what_the_engine_runs_is_logged(
    monkeypatch: pytest.MonkeyPatch, mini_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, plugins: int
) -> None:
    fake_builder(monkeypatch, f'print(\'{{"engine_layers": 612, "engine_plugins": {plugins}}}\')')
    with caplog.at_level("INFO", logger="cat_pruning.engines.builder.build"):
        built = build_plan(TENSORRT, mini_bundle / "step.onnx", tmp_path / "step.plan", [])
    assert built == PlanReport(engine_layers=612, engine_plugins=plugins)
    assert caplog.messages[0] == f"step.onnx: {plugins} of the engine's 612 layers are plugins"
    assert [record.levelname for record in caplog.records[1:]] == ([] if plugins else ["WARNING"])


@pytest.mark.parametrize(
    ("report", "level", "words"),
    [
        ({"attention": "fused", "fused_attention": 48, "scratch_bytes": 9000, "score_bytes": 50}, "INFO", "so: 48;"),
        ({"attention": "fused", "fused_attention": 0, "scratch_bytes": 9, "score_bytes": 50}, "WARNING", "so: 0;"),
        ({"attention": "fused", "scratch_bytes": 9000, "score_bytes": 50}, "WARNING", "memory 9,000 bytes"),
        ({"attention": "fused", "scratch_bytes": 9, "score_bytes": 50}, "INFO", "score matrix 50"),
        ({"attention": "fused", "score_bytes": 50}, "INFO", "memory not known bytes"),
        ({"attention": "decomposable", "fused_attention": 0}, "INFO", "built as decomposable"),
    ],
)
def test_attention_that_may_not_be_fused_is_told(
    monkeypatch: pytest.MonkeyPatch,
    mini_bundle: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    report: dict[str, Any],
    level: str,
    words: str,
) -> None:
    fake_builder(monkeypatch, f"print({json.dumps(report)!r})")
    with caplog.at_level("INFO", logger="cat_pruning.engines.builder.build"):
        built = build_plan(TENSORRT, mini_bundle / "step.onnx", tmp_path / "step.plan", [])
    assert built.attention == report["attention"]
    (record,) = [record for record in caplog.records if "attention was built" in record.message]
    assert record.levelname == level
    assert words in record.message


def test_what_the_builder_warns_of_is_told(
    monkeypatch: pytest.MonkeyPatch, mini_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_builder(monkeypatch, 'print(\'{"warnings": ["fused attention was refused"]}\')')
    built = build_plan(TENSORRT, mini_bundle / "step.onnx", tmp_path / "step.plan", [])
    assert built == PlanReport(warnings=("fused attention was refused",))
    assert caplog.messages == ["step.onnx: fused attention was refused"]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_builder_without_its_library(mini_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^TensorRT cannot build step\.onnx: TensorRT cannot be imported here .*pip"):
        build_plan(TENSORRT, mini_bundle / "step.onnx", tmp_path / "step.plan", [])
