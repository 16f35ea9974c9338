"""Plans that are added to a bundle later, without a new export."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundle_files import without_plans

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.plan_sets import plan_sets
from cat_pruning.bundle.profiles import plan_profiles
from cat_pruning.engines.builder import build
from cat_pruning.engines.plan_choice import plans_for
from cat_pruning.errors import BundleError, EngineError, OutputError
from cat_pruning.exporter.add_plans import add_plans
from cat_pruning.names import Target
from cat_pruning.step_io import Part

CatExport = Callable[..., tuple[int, str, list[str]]]


def link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


@pytest.fixture
def graphs(mini_bundle: Path, tmp_path: Path) -> Path:
    """sd3-mini without plans."""
    return without_plans(mini_bundle, tmp_path / "places" / "sd3-mini")


class Machine:
    """A machine with TensorRT and a GPU, and a builder that writes what it was asked for."""

    def __init__(self) -> None:
        self.version, self.architecture = "11.4.0", "sm90"
        self.jobs: list[dict[str, Any]] = []
        self.refuses = ""  # the graph that it does not build
        self.meanwhile: Callable[[], object] = lambda: None  # done while it builds

    def run(self, command: list[str], *, input: str, **_: object) -> subprocess.CompletedProcess[str]:
        job = json.loads(input)
        self.jobs.append(job)
        self.meanwhile()
        if self.refuses and Path(job["onnx"]).name == self.refuses:
            return subprocess.CompletedProcess(command, 1, '{"problem": "no kernel", "remedy": "try another"}', "")
        Path(job["plan"]).write_text(f"{job['flavour']} {self.version} {self.architecture} {Path(job['onnx']).name}")
        return subprocess.CompletedProcess(command, 0, '{"engine_layers": 9, "engine_plugins": 5}', "")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(build.subprocess, "run", machine.run)
    monkeypatch.setattr(build, "tensorrt_library", lambda flavour: SimpleNamespace(__version__=machine.version))
    monkeypatch.setattr(build, "gpu_architecture", lambda: machine.architecture)
    return machine


def test_plans_of_several_machines_lie_side_by_side(cat_export: CatExport, graphs: Path, machine: Machine) -> None:
    before = Bundle.open(graphs).manifest
    for machine.version, machine.architecture in (("11.4.0", "sm90"), ("11.4.0", "sm120"), ("11.5.0", "sm90")):
        code, printed, errors = cat_export("--add-plans", graphs, "--target", "tensorrt")
        assert (code, errors) == (0, [])
        assert f"TensorRT {machine.version} plans for {machine.architecture}; token operators: plugin" in printed
    code, printed, errors = cat_export("--add-plans", graphs, "--target", "tensorrt_rtx")
    assert (code, errors) == (0, [])
    assert printed.count("plans for") == 1  # of those that were added
    bundle = Bundle.open(graphs)
    for version, architecture in (("11.4.0", "sm90"), ("11.4.0", "sm120"), ("11.5.0", "sm90")):
        chosen = plans_for(bundle, "tensorrt", version=version, architecture=architecture)
        for part, spec in chosen.items():
            assert bundle.verified(spec.file).read_text() == f"tensorrt {version} {architecture} {part.onnx}"
            assert spec.plugin_layers == 5  # what the build found out
    rtx = plans_for(bundle, "tensorrt_rtx", version="11.5.0", architecture="sm89")
    assert bundle.verified(rtx[Part.STEP].file).read_text().startswith("tensorrt_rtx 11.5.0")
    # Of the bundle's own profiles, from its own graphs, with the timings that lie beside it.
    geometry = before.geometry
    for job in machine.jobs:
        graph = next(graph for graph in before.graphs if graph.file == Path(job["onnx"]).name)
        shapes = plan_profiles(graph, before.profiles, geometry.patch_size)
        assert job["profiles"] == json.loads(json.dumps(shapes))
    assert {Path(job["onnx"]).parent for job in machine.jobs} == {graphs}
    assert machine.jobs[0]["timing_cache"] == f"{graphs}.cache/tensorrt-11.4.0-sm90.timing"
    after = bundle.manifest
    assert after.digest == before.digest
    assert after.model_copy(update={"plans": (), "files": {}}) == before.model_copy(update={"files": {}})
    assert sorted(path.name for path in graphs.parent.iterdir()) == ["sd3-mini"]


def test_plans_of_the_other_parts(component_bundle: Path, machine: Machine, tmp_path: Path) -> None:
    copy = shutil.copytree(component_bundle, tmp_path / "parts", copy_function=link)
    (copy / "manifest.json").unlink()  # of which the fixture keeps its own
    shutil.copyfile(component_bundle / "manifest.json", copy / "manifest.json")
    bundle = add_plans(copy, (Target.TENSORRT,))
    graphs = ["prompt", "timestep", "step", "text_encoder", "vae_decoder", "vae_encoder"]
    assert [str(plan.part) for plan in bundle.manifest.plans] == graphs
    assert [plan.token_ops for plan in bundle.manifest.plans] == ["plugin"] * 3 + ["function"] * 3
    assert [Path(job["onnx"]).name for job in machine.jobs] == [f"{name}.onnx" for name in graphs]
    assert machine.jobs[3]["profiles"] == [{"input_ids": [[1, 24]] * 3}]
    assert machine.jobs[4]["profiles"] == [{"latents": [[1, 4, 32, 32]] * 3}]
    assert len(plan_sets(bundle.manifest.plans)) == 1
    chosen = plans_for(bundle, "tensorrt", version="11.4.0", architecture="sm90")
    assert [str(part) for part in chosen] == graphs
    without = tuple(plan for plan in bundle.manifest.plans if plan.part != "vae_decoder")
    lacking = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"plans": without}))
    with pytest.raises(EngineError, match=r"has no plan of vae_decoder\.onnx for TensorRT 11\.4\.0 on sm90"):
        plans_for(lacking, "tensorrt", version="11.4.0", architecture="sm90")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "onnx"], "--add-plans: no plans to build; give --target tensorrt or"),
        (
            ["--dtype", "fp16", "--out", "x"],
            "--add-plans goes with no --out, --dtype: the bundle says what was exported",
        ),
        (["--verify"], "--add-plans goes with no --verify"),
        (["--model", "sd3-mini"], "argument --model: not allowed with argument --add-plans"),
        (["--target", "tensorrt", "--force"], "--add-plans goes with no --force"),
    ],
)
def test_what_does_not_go_with_it(
    cat_export: CatExport, graphs: Path, machine: Machine, arguments: list[str], message: str
) -> None:
    before = Bundle.open(graphs)
    code, _, errors = cat_export("--add-plans", graphs, *arguments)
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]
    assert Bundle.open(graphs) == before
    assert machine.jobs == []


def test_plans_that_are_there_already(cat_export: CatExport, graphs: Path, machine: Machine) -> None:
    add_plans(graphs, [Target.TENSORRT])
    built = len(machine.jobs)
    code, _, errors = cat_export("--add-plans", graphs, "--target", "tensorrt_rtx", "--target", "tensorrt")
    assert code == 2
    assert errors == [
        f"cat-export: {graphs} has plans of TensorRT 11.4.0 for sm90 already; to build them anew, drop those first: "
        f"cat-bundle prune {graphs} --plans tensorrt-11.4.0-sm90"
    ]
    assert len(machine.jobs) == built


def test_a_plan_that_fails_adds_none(graphs: Path, machine: Machine) -> None:
    before, files = Bundle.open(graphs), sorted(graphs.rglob("*"))
    machine.refuses = "step.onnx"
    with pytest.raises(EngineError, match=r"TensorRT cannot build step.onnx: no kernel; try another"):
        add_plans(graphs, [Target.TENSORRT_RTX, Target.TENSORRT])
    assert Bundle.open(graphs) == before
    assert sorted(graphs.rglob("*")) == files
    assert [path.name for path in graphs.parent.iterdir()] == ["sd3-mini"]


def test_graphs_that_were_edited_are_not_built_from(graphs: Path, machine: Machine) -> None:
    content = (graphs / "step.onnx.data").read_bytes()
    (graphs / "step.onnx.data").unlink()
    (graphs / "step.onnx.data").write_bytes(b"x" + content[1:])
    with pytest.raises(BundleError, match=r"step\.onnx\.data was changed after the export"):
        add_plans(graphs, [Target.TENSORRT])
    assert machine.jobs == []


def test_a_bundle_that_is_replaced_meanwhile(graphs: Path, machine: Machine) -> None:
    def replace() -> None:
        manifest = Bundle.open(graphs).manifest
        other = manifest.model_copy(update={"settings": manifest.settings.replace(full_steps=5)})
        (graphs / "manifest.json").write_text(other.model_dump_json())

    machine.meanwhile = replace
    with pytest.raises(OutputError, match=r"was replaced by another export meanwhile.*; add them again"):
        add_plans(graphs, [Target.TENSORRT])
    assert Bundle.open(graphs).manifest.plans == ()
    assert not (graphs / "plans").exists()


def test_plans_that_another_adds_meanwhile_stay(graphs: Path, machine: Machine) -> None:
    def another() -> None:
        machine.meanwhile = lambda: None
        machine.architecture = "sm120"
        with pytest.MonkeyPatch.context() as patch:  # as a process of its own has another number
            patch.setattr("os.getpid", lambda: 2**22 + 1)
            patch.setattr("cat_pruning.bundle.bundle._runs", lambda path: True)
            add_plans(graphs, [Target.TENSORRT])

    machine.meanwhile = another
    bundle = add_plans(graphs, [Target.TENSORRT])
    assert {plan.architectures for plan in bundle.manifest.plans} == {("sm90",), ("sm120",)}


def test_a_file_of_somebodys_in_a_plans_place(graphs: Path, machine: Machine) -> None:
    own = graphs / "plans" / "tensorrt-11.4.0-sm90" / "step.plan"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(OutputError, match=r"has plans/tensorrt-11.4.0-sm90/step.plan, not listed by its manifest.json"):
        add_plans(graphs, [Target.TENSORRT])
    assert own.read_text() == "mine"


def test_a_machine_that_is_too_small(graphs: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cat_pruning.exporter.memory.total_memory", lambda: 2 << 30)
    with pytest.raises(EngineError, match=r"and this machine has 2 GiB; add the plans on a larger machine"):
        add_plans(graphs, [Target.TENSORRT])


def test_a_disk_that_is_full(graphs: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cat_pruning.bundle.bundle._free_bytes", lambda out: 1000)
    with pytest.raises(OutputError, match=r"needs about .* GiB, .* GiB free on that disk; make room"):
        add_plans(graphs, [Target.TENSORRT])
    assert machine.jobs == []
