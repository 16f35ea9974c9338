from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from cat_pruning.engines import build
from cat_pruning.engines.build import build_plan, can_build, plan_specs
from cat_pruning.engines.bundle import Bundle
from cat_pruning.engines.profiles import PlanProfile, plan_profiles, profile_spec
from cat_pruning.engines.records import Geometry, PlanSpec
from cat_pruning.errors import EngineError
from cat_pruning.exporter.export import graph_spec
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part

needs_rtx = pytest.mark.skipif(not can_build("tensorrt_rtx"), reason="TensorRT-RTX is not installed; install '.[rtx]'")

RTX = PlanSpec(
    part=Part.STEP,
    flavour="tensorrt_rtx",
    version="1.7",
    architectures=("sm80",),
    token_ops="function",
    file="rtx.plan",
)

# Run with: step.onnx, out. Writes a bundle whose plan may not grow beyond 64 kB.
SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from cat_pruning.engines.build import build_plan, plan_specs
from cat_pruning.engines.bundle import new_bundle

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
with new_bundle(Path(sys.argv[2]), force=False, needed_bytes=1) as writer:
    build_plan(plan_specs("tensorrt_rtx")[0], Path(sys.argv[1]), writer.path / "rtx.plan", eval(sys.argv[3]))
"""


def shapes_of(bundle: Bundle) -> list[PlanProfile]:
    """The profiles of the plan of step.onnx."""
    manifest = bundle.manifest
    return plan_profiles(manifest.graph(Part.STEP), manifest.profiles, manifest.geometry.patch_size)


def fake_builder(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """The builder's process runs `program` instead."""
    real = subprocess.run

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[1:] == ["-m", "cat_pruning.engines.plan_builder"]
        return real([sys.executable, "-c", program], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(build.subprocess, "run", run)


@needs_rtx
def test_the_bundle_has_the_plans_that_its_manifest_lists(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle)
    plans = bundle.manifest.plans
    assert plans == plan_specs("tensorrt_rtx")
    assert [plan.part for plan in plans] == list(Part)
    assert len({plan.file for plan in plans}) == 3
    for plan in plans:
        assert plan.version in plan.file
        assert plan.token_ops == "function"
        assert bundle.manifest.versions["tensorrt_rtx"] == plan.version
        weights = (mini_bundle / f"{plan.part.onnx}.data").stat().st_size
        assert bundle.verified(plan.file).stat().st_size == bundle.manifest.files[plan.file].size > weights / 2


@needs_rtx
@pytest.mark.parametrize("part", list(Part))
@pytest.mark.parametrize("kind", ["sd3.5", "pixart", "flux-dev"])
def test_every_family_can_be_built(tiny_export: Any, tmp_path: Path, part: Part) -> None:
    """In fp32, for which there is no fused attention kernel."""
    family, config = tiny_export.step.family, tiny_export.step.transformer.config
    geometry = Geometry(pixels_per_latent=8, patch_size=2, latent_channels=4, max_latent_size=None, text_length=7)
    guidance = family.batched_guidance
    profile = profile_spec(80, 64, 1, geometry=geometry, settings=PruneSettings(num_clusters=4), guidance=guidance)
    assert geometry.patch_size == family.patch_size(config)
    graph = graph_spec(part, tiny_export.graphs[part])
    profiles = plan_profiles(graph, [profile], geometry.patch_size)
    assert len(profiles) == (2 if part is Part.STEP else 1)
    plan = tmp_path / "plans" / "tiny.plan"
    build_plan(RTX, tiny_export.directory / graph.file, plan, profiles)
    assert plan.stat().st_size > (tiny_export.directory / f"{part.onnx}.data").stat().st_size / 2


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


@needs_rtx
def test_a_disk_that_becomes_full_while_the_plan_is_written(mini_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "outs" / "bundle"
    command = [sys.executable, "-c", SMALL_DISK, str(mini_bundle / "step.onnx"), str(out)]
    command.append(repr(shapes_of(Bundle.open(mini_bundle))))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stderr.splitlines()[-1].startswith("cat_pruning.errors.OutputError: disk full (")
    assert "rtx.plan" in result.stderr.splitlines()[-1]
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
