"""`--verify` finds files that are damaged and graphs that compute something else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cat_pruning.dtype import DType
from cat_pruning.errors import EngineError
from cat_pruning.exporter.verify import verify_step_graph
from cat_pruning.families.interception import StepModule


@pytest.fixture
def exported(export_tiny: Any, tmp_path: Path) -> Any:
    export = export_tiny("pixart")
    shutil.copytree(export.directory, tmp_path / "files")
    return export


def test_a_good_export(exported: Any, tmp_path: Path) -> None:
    assert 0 < verify_step_graph(exported.step, tmp_path / "files", DType.FP32) < 1e-4


@pytest.mark.parametrize("damage", ["not onnx", "no weights"])
@pytest.mark.parametrize("part", ["prompt", "timestep", "step"])
def test_a_damaged_file(exported: Any, tmp_path: Path, part: str, damage: str) -> None:
    if damage == "not onnx":
        (tmp_path / "files" / f"{part}.onnx").write_bytes(b"not a model")
    else:
        (tmp_path / "files" / f"{part}.onnx.data").unlink()
    with pytest.raises(EngineError, match=rf"--verify: ONNX Runtime cannot load {part}\.onnx"):
        verify_step_graph(exported.step, tmp_path / "files", DType.FP32)


def test_a_graph_of_other_weights(exported: Any, make_tiny: Any, tmp_path: Path) -> None:
    other = make_tiny("pixart")
    other.proj_out.weight.data.mul_(1.001)
    with pytest.raises(EngineError, match=r"noise_out of a step with \d+ of 70 tokens is off torch's by"):
        verify_step_graph(StepModule(other, exported.step.family), tmp_path / "files", DType.FP32)
