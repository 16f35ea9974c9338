"""Engines of one node over the doubles: what is right, and that each thing that may be wrong is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import tensorrt_double
import token_engines
import torch
from tensorrt_double import IExecutionContext, TensorRTDouble, write_plan
from token_engines import GATHER, GUARD_BYTES, SCATTER, Guarded, OneNode, check_token_engines, one_nodes

from cat_pruning.bundle.schema import PlanSpec
from cat_pruning.engines import plan as plan_module
from cat_pruning.engines.builder.build import build_plan, can_build, plan_specs
from cat_pruning.errors import EngineError
from cat_pruning.exporter.importer_rules import importer_findings
from cat_pruning.step_io import Part

CPU = torch.device("cpu")
SIZE = (2, 33, 7, 12)
SPEC = PlanSpec(
    part=Part.STEP,
    flavour="tensorrt",
    version="11.4",
    architectures=("sm90",),
    token_ops="plugin",
    file="plans/step.plan",
)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> TensorRTDouble:
    """The double's runtime, and its plans in the builder's place."""
    double = TensorRTDouble()
    monkeypatch.setattr(plan_module, "tensorrt_library", lambda flavour: double)

    def build(spec: PlanSpec, graph: Path, plan: Path, profiles: Any) -> None:
        in_place = spec.token_ops == "plugin" and graph.stem == SCATTER
        write_plan(plan, graph, profiles, {"out": "tokens"} if in_place else {})

    monkeypatch.setattr(token_engines, "build_plan", build)
    return double


def run(operator: str, folder: Path, *, in_place: bool = True) -> list[str]:
    node = OneNode(operator, torch.float32, SIZE)
    spec = SPEC if in_place else SPEC.model_copy(update={"token_ops": "function"})
    problems: list[str] = node.run("tensorrt", node.build(spec, folder), CPU, in_place=in_place)["problems"]
    return problems


@pytest.mark.parametrize("operator", [GATHER, SCATTER])
@pytest.mark.parametrize("in_place", [True, False])
def test_what_is_right(tmp_path: Path, operator: str, in_place: bool) -> None:
    assert run(operator, tmp_path, in_place=in_place) == []


def disturbed(monkeypatch: pytest.MonkeyPatch, after: Callable[[IExecutionContext, dict[str, int]], None]) -> None:
    """A kernel that does `after` to the addresses that it got besides its work."""
    compute = IExecutionContext._compute

    def wrong(self: IExecutionContext, session: Any, shapes: Any, addresses: dict[str, int]) -> None:
        compute(self, session, shapes, addresses)
        after(self, addresses)

    monkeypatch.setattr(IExecutionContext, "_compute", wrong)


def write(address: int, value: int = 0) -> None:
    memory = tensorrt_double._memory({"x": address}, "x", (1,), tensorrt_double.DataType.INT32)
    memory[...] = value


@pytest.mark.parametrize("operator", [GATHER, SCATTER])
@pytest.mark.parametrize("in_place", [True, False])
def test_bytes_beside_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operator: str, in_place: bool
) -> None:
    disturbed(monkeypatch, lambda self, addresses: write(addresses["out"] - 4))
    name = "tokens" if in_place and operator == SCATTER else "out"
    assert run(operator, tmp_path, in_place=in_place) == [f"4 bytes around {name} were written to"]


def test_an_input_that_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed(monkeypatch, lambda self, addresses: write(addresses["rows"], 7))
    assert run(SCATTER, tmp_path) == ["rows was changed"]


@pytest.mark.parametrize("operator", [GATHER, SCATTER])
def test_rows_that_are_not_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    disturbed(monkeypatch, lambda self, addresses: write(addresses["out"], 7))
    (problem,) = run(operator, tmp_path)
    assert problem == f"1 of {2 * (7 if operator == GATHER else 33)} rows are not torch's"


def test_guards_at_both_ends() -> None:
    guarded = Guarded(torch.zeros(3, 5, dtype=torch.bfloat16), CPU)
    guarded.tensor.fill_(1)
    assert guarded.damaged_bytes == 0
    guarded._memory[GUARD_BYTES - 1] = 0
    guarded._memory[GUARD_BYTES + 30] = 0
    assert guarded.damaged_bytes == 2


def test_every_operator_and_dtype_and_what_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the double, which computes in fp32 only."""
    monkeypatch.setattr(token_engines, "KINDS", {torch.float32: onnx.TensorProto.FLOAT})
    results = check_token_engines(SPEC, tmp_path / "right", CPU)
    assert [each["problems"] for each in results] == [[]] * len(list(one_nodes()))
    assert {each["operator"] for each in results} == {GATHER, SCATTER}

    def refuse(*arguments: Any) -> None:
        raise EngineError("TensorRT cannot build it")

    monkeypatch.setattr(token_engines, "build_plan", refuse)
    results = check_token_engines(SPEC, tmp_path / "refused", CPU)
    assert {tuple(each["problems"]) for each in results} == {("TensorRT cannot build it",)}


@pytest.mark.parametrize("operator", [GATHER, SCATTER])
@pytest.mark.parametrize("dtype", token_engines.KINDS)
def test_the_graphs(tmp_path: Path, operator: str, dtype: torch.dtype) -> None:
    OneNode(operator, dtype, SIZE).write(tmp_path / "one.onnx")
    onnx.checker.check_model(tmp_path / "one.onnx", full_check=True)
    assert importer_findings(tmp_path / "one.onnx") == []


@pytest.mark.long
@pytest.mark.skipif(not can_build("tensorrt_rtx"), reason="TensorRT-RTX is not installed; install '.[tensorrt-rtx]'")
def test_the_real_tensorrt_rtx_builds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_engines, "build_plan", build_plan)
    for operator in (GATHER, SCATTER):
        plan = OneNode(operator, torch.bfloat16, SIZE).build(plan_specs("tensorrt_rtx")[-1], tmp_path)
        assert plan.stat().st_size > 0
