"""Strict where fused kernels exist, then decomposable with a warning; over the double of TensorRT's builder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from builder_double import Tensorrt

from cat_pruning.engines.builder.build import can_build
from cat_pruning.engines.builder.fused_attention import decomposable_path, make_decomposable, why_not_fused
from cat_pruning.engines.builder.plan_builder import PlanJob, build
from cat_pruning.errors import EngineError

needs_rtx = pytest.mark.skipif(
    not can_build("tensorrt_rtx"), reason="TensorRT-RTX is not installed; install '.[tensorrt-rtx]'"
)
no_plugins = pytest.mark.parametrize("tensorrt", [False], indirect=True)

MakeJob = Callable[..., PlanJob]


@pytest.fixture
def job(attention_job: MakeJob) -> PlanJob:
    return attention_job()


def marks(tensorrt: Tensorrt) -> list[str]:
    return [words for words in tensorrt.asked if words.startswith("decomposable")]


@needs_rtx
@no_plugins
def test_strict_first(tensorrt: Tensorrt, job: PlanJob) -> None:
    report = build(job)
    assert report.attention == "fused"
    assert report.score_bytes == 2 * 4 * 9 * 9 * 2
    assert not report.warnings
    assert marks(tensorrt) == ["decomposable [False]"]


@needs_rtx
@no_plugins
def test_refused_it_is_built_without_and_says_so(tensorrt: Tensorrt, job: PlanJob) -> None:
    tensorrt.refusals = 1
    report = build(job)
    assert report.attention == "decomposable"
    (warning,) = report.warnings
    assert warning == (
        "fused attention was refused, and whatever the builder takes is built (Could not find any implementation for "
        "node {ForeignNode})"
    )
    assert marks(tensorrt) == ["decomposable [False]", "decomposable [True]"]
    assert Path(job.plan).stat().st_size > 0


@needs_rtx
@no_plugins
def test_refused_twice_it_is_an_error(tensorrt: Tensorrt, job: PlanJob) -> None:
    tensorrt.refusals = 2
    with pytest.raises(EngineError, match=r"^Could not find any implementation for node \{ForeignNode\}$"):
        build(job)


@needs_rtx
@no_plugins
def test_out_of_memory_it_is_not_built_again(tensorrt: Tensorrt, job: PlanJob, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt.refusals, tensorrt.refusal = 1, "[defaultAllocator.cpp] Error Code 1: out of memory"
    with pytest.raises(EngineError, match="out of memory"):
        build(job)
    assert marks(tensorrt) == ["decomposable [False]"]


@needs_rtx
@no_plugins
def test_refused_for_a_plugin_it_is_not_built_again(
    tensorrt: Tensorrt, job: PlanJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt.refusals = 1
    monkeypatch.setattr("cat_pruning.engines.builder.plan_builder._callback_errors", lambda job: ["EngineError: no"])
    with pytest.raises(EngineError, match="Could not find any implementation"):
        build(job)
    assert marks(tensorrt) == ["decomposable [False]"]


@needs_rtx
@no_plugins
@pytest.mark.parametrize(
    ("dtype", "width", "architecture"), [("float", 64, "sm90"), ("bfloat16", 8, "sm90"), ("float16", 64, "sm70")]
)
def test_where_there_is_no_fused_kernel_none_is_asked_for(
    tensorrt: Tensorrt, attention_job: MakeJob, dtype: str, width: int, architecture: str
) -> None:
    report = build(attention_job(dtype, width, architectures=(architecture,)))
    assert report.attention == "decomposable"
    assert marks(tensorrt) == ["decomposable [True]"]
    assert not report.warnings  # nothing was refused


@needs_rtx
@no_plugins
def test_bindings_that_cannot_cast_a_layer_get_the_nodes_attribute(
    tensorrt: Tensorrt, attention_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real importer of TensorRT-RTX reads it."""
    monkeypatch.setattr("cat_pruning.engines.builder.plan_builder.make_decomposable", lambda trt, layers: False)
    job = attention_job("float")
    assert build(job).attention == "decomposable"
    assert marks(tensorrt) == ["decomposable [True]"]
    copy = onnx.load(decomposable_path(Path(job.onnx)))
    (attention,) = [node for node in copy.graph.node if node.op_type == "Attention"]
    assert {attribute.name: attribute.i for attribute in attention.attribute}["TRT_decomposable"] == 1


def test_layers_that_cannot_be_cast() -> None:
    class Base:
        __slots__ = ()

    class Attention:
        __slots__ = ("attention",)

    assert not make_decomposable(SimpleNamespace(IAttentionInputLayer=Attention), [Base()])  # another layout
    assert not make_decomposable(SimpleNamespace(), [Base()])  # no such class


def layer(dtype: str, width: int) -> Any:
    query = SimpleNamespace(dtype=SimpleNamespace(name=dtype), shape=(-1, 24, -1, width))
    return SimpleNamespace(get_input=lambda index: query)


@pytest.mark.parametrize(
    ("dtype", "width", "architecture", "reason"),
    [
        ("BF16", 64, "sm90", None),
        ("HALF", 72, "sm75", None),
        ("BF16", 256, "sm120", None),
        ("BF16", 16, "sm80", None),
        ("BF16", 128, "sm70", "sm70 is older than sm75"),
        ("FLOAT", 64, "sm90", "queries are FLOAT, not of 16 bits"),
        ("BF16", 8, "sm90", "heads are 8 wide, not a multiple of 8 from 16 to 256"),
        ("BF16", 264, "sm90", "heads are 264 wide"),
        ("BF16", 68, "sm90", "heads are 68 wide"),
    ],
)
def test_the_limits_of_fused_kernels(dtype: str, width: int, architecture: str, reason: str | None) -> None:
    found = why_not_fused([layer("BF16", 64), layer(dtype, width)], [architecture])
    assert found == reason if reason is None else found is not None and found.startswith(reason)


def test_a_graph_without_attention() -> None:
    assert why_not_fused([], ["sm90"]) is None
