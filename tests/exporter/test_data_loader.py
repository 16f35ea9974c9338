"""The data loader of a bundle: valid inputs of every graph, taken by the real Polygraphy."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from cat_pruning.bundle.profiles import profile_spec
from cat_pruning.bundle.schema import Geometry
from cat_pruning.engines.builder.build import can_build
from cat_pruning.exporter import data_loader
from cat_pruning.exporter.export import graph_spec
from cat_pruning.exporter.verify import run_graphs
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part

needs_polygraphy = pytest.mark.skipif(
    importlib.util.find_spec("polygraphy") is None, reason="Polygraphy is not installed; install '.[debug]'"
)
needs_rtx = pytest.mark.skipif(not can_build("tensorrt_rtx"), reason="TensorRT-RTX is not installed; install '.[rtx]'")
FUNCTIONS = {"step": "load_data", "prompt": "load_prompt", "timestep": "load_timestep"}
MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(export_tiny: Any, tmp_path: Path) -> MakeFolder:
    """A tiny model's graphs as a bundle has them, with as much of a manifest as the script reads."""

    def make(kind: str, **changes: Any) -> Path:
        export = export_tiny(kind)
        for part in Part:
            for name in (part.onnx, f"{part.onnx}.data"):
                shutil.copyfile(export.directory / name, tmp_path / name)
        shutil.copyfile(data_loader.__file__, tmp_path / "data_loader.py")
        geometry = Geometry(pixels_per_latent=8, patch_size=2, latent_channels=4, max_latent_size=None, text_length=7)
        guidance, settings = export.step.family.batched_guidance, PruneSettings(num_clusters=4)
        profile = profile_spec(80, 64, 1, geometry=geometry, settings=settings, guidance=guidance)
        graphs = [graph_spec(part, graph).model_dump(mode="json") for part, graph in export.graphs.items()]
        manifest = {"dtype": "fp32", "profiles": [profile.model_dump()], "graphs": graphs} | changes
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return tmp_path

    return make


def script_of(folder: Path) -> ModuleType:
    """The script, imported from where it lies."""
    spec = importlib.util.spec_from_file_location("bundled_data_loader", folder / "data_loader.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def graph_in(folder: Path, part: str) -> Any:
    return onnxruntime.InferenceSession(folder / f"{part}.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture
def polygraphy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the tool in this process, in a bundle; its exit code and what it printed."""

    def run(folder: Path, *arguments: str) -> tuple[int, str]:
        from polygraphy.tools import main

        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["polygraphy", *arguments])
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its own, of how it looks for its plugins
            code = main()
        return code, capsys.readouterr().out

    return run


@needs_polygraphy
@pytest.mark.parametrize("part", ["prompt", "timestep", "step"])
@pytest.mark.parametrize("kind", ["sd3", "pixart", "flux-dev"])
def test_polygraphy_runs_every_graph(folder: MakeFolder, polygraphy: Any, kind: str, part: str) -> None:
    script = f"data_loader.py:{FUNCTIONS[part]}"
    code, printed = polygraphy(
        folder(kind), "run", f"{part}.onnx", "--onnxrt", "--data-loader-script", script, "--validate"
    )
    assert code == 0, printed
    assert "PASSED | Output: " in printed
    assert "FAILED" not in printed


@needs_polygraphy
def test_the_step_needs_no_functions_name(folder: MakeFolder, polygraphy: Any) -> None:
    code, printed = polygraphy(folder("sd3"), "run", "step.onnx", "--onnxrt", "--data-loader-script", "data_loader.py")
    assert code == 0, printed


@needs_polygraphy
def test_polygraphy_inspects_a_graph(folder: MakeFolder, polygraphy: Any) -> None:
    code, printed = polygraphy(folder("sd3"), "inspect", "model", "step.onnx", "--show", "layers")
    assert code == 0, printed
    assert "Other Opsets: {'cat': 1}" in printed
    assert "'batch', 'joint_rows', 32" in printed
    assert "[Op: TokenScatter]" in printed


@pytest.mark.parametrize("kind", ["sd3", "pixart", "flux-dev"])
def test_the_inputs_of_a_pruned_step(folder: MakeFolder, kind: str) -> None:
    """What it takes from the other graphs, and from a full step, is what these compute."""
    bundle = folder(kind)
    script = script_of(bundle)
    (step,), (full,), (again,) = script.load_data(), script.load_full_step(), script.load_data()
    for rows, count in ((step["keep_indices"], 6), (full["keep_indices"], 20)):
        assert rows.shape[1] == count
        assert all(list(row) == sorted(set(row)) and row[0] >= 0 and row[-1] < 20 for row in rows)
    (prompt,), (timestep,) = script.load_prompt(), script.load_timestep()
    states = run_graphs([graph_in(bundle, "prompt"), graph_in(bundle, "timestep")], {**prompt, **timestep})
    results = run_graphs([graph_in(bundle, "step")], full)
    for name, value in step.items():
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(value, again[name])
        if "_states_" in name:
            np.testing.assert_array_equal(value, states[name])
        if f"{name}_out" in results:
            np.testing.assert_array_equal(value, results[f"{name}_out"])
            assert value.std() > 0
    assert 0 <= timestep["timestep"].min() <= timestep["timestep"].max() <= 1


@pytest.mark.parametrize("kind", ["sd3", "pixart", "flux-dev"])
def test_without_onnx_runtime(folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The inputs are random, and a step of them is finite all the same."""
    bundle = folder(kind)
    script = script_of(bundle)
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    for inputs, count in ((script.load_data(), 6), (script.load_full_step(), 20)):
        (step,) = inputs
        assert step["keep_indices"].shape[1] == count
        (noise, *_) = graph_in(bundle, "step").run(None, step)
        assert np.isfinite(noise).all()


def test_in_bf16_the_inputs_are_torch_tensors(folder: MakeFolder) -> None:
    bundle = folder("sd3")
    manifest = json.loads((bundle / "manifest.json").read_text())
    for graph in manifest["graphs"]:
        for tensor in graph["inputs"]:
            is_half = tensor["dtype"] == "FLOAT" and tensor["name"] != "timestep"
            tensor["dtype"] = "BFLOAT16" if is_half else tensor["dtype"]
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"dtype": "bf16"}))
    script = script_of(bundle)
    (step,), (timestep,) = script.load_data(), script.load_timestep()
    assert step["noise"].dtype is torch.bfloat16
    assert step["keep_indices"].dtype is torch.int32
    assert timestep["timestep"].dtype is torch.float32
    assert timestep["pooled_projections"].dtype is torch.bfloat16


@pytest.mark.long
@needs_polygraphy
@needs_rtx
def test_polygraphy_builds_the_step_for_tensorrt_rtx(folder: MakeFolder, tmp_path: Path) -> None:
    """In a process of its own: Polygraphy serves one TensorRT per process. To load the plan needs a GPU."""
    command = [sys.executable, "-c", "from polygraphy.tools import main; main()", "convert", "step.onnx"]
    command += ["--convert-to", "trt", "--trt-config-script", "data_loader.py", "-o", "polygraphy.plan"]
    environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    result = subprocess.run(command, cwd=folder("sd3"), env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert (tmp_path / "polygraphy.plan").stat().st_size > (tmp_path / "step.onnx.data").stat().st_size / 2
