"""The double of TensorRT's builder in the builder's place, and the least that it builds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from builder_double import Tensorrt

from cat_pruning.engines.builder import plan_builder
from cat_pruning.engines.builder.plan_builder import PlanJob
from cat_pruning.engines.tensorrt_library import library_log, tensorrt_library

ATTENTION = """
<ir_version: 10, opset_import: ["" : 23]>
step ({dtype}[B, 4, n, {width}] query, {dtype}[B, S, {all}] key_cache_0) => ({dtype}[B, 4, n, {width}] attended)
<int64[4] sizes = {{0, 0, 4, {width}}}>
{{
    rows = Reshape (key_cache_0, sizes)
    key = Transpose <perm = [0, 2, 1, 3]> (rows)
    attended = Attention <scale = 1.0> (query, key, key)
}}
"""


@pytest.fixture
def tensorrt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tensorrt:
    """TensorRT's double; its parser takes plugins unless the test is parametrized with False."""
    double = Tensorrt(getattr(request, "param", True))
    log = library_log(tensorrt_library("tensorrt_rtx"))  # a process has one
    monkeypatch.setattr(plan_builder, "tensorrt_library", lambda flavour: {"tensorrt": double}[flavour])
    monkeypatch.setattr(plan_builder, "library_log", lambda module: log)
    plugin = ModuleType("cat_pruning.plugins.tensorrt_plugin")
    vars(plugin).update(
        register_token_plugins=lambda trt: double.asked.append(f"register in {trt.__name__}"),
        compile_kernels=lambda tokens, indices: double.asked.append(f"compile for {tokens.dtype.name} {tokens.shape}"),
        callback_errors=double.callback_errors,
    )
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    return double


@pytest.fixture
def attention_job(tmp_path: Path) -> Callable[..., PlanJob]:
    """One attention of four heads of queries over a cache, in 16 bits or, with "float", in fp32; built in no time."""

    def make(dtype: str = "bfloat16", width: int = 64, **changes: Any) -> PlanJob:
        graph = onnx.parser.parse_model(ATTENTION.format(dtype=dtype, width=width, all=4 * width))
        onnx.checker.check_model(graph, full_check=True)
        onnx.save(graph, tmp_path / "step.onnx")
        shapes = {"query": (2, 4, 5, width), "key_cache_0": (2, 9, 4 * width)}
        given: dict[str, Any] = {
            "flavour": "tensorrt",
            "onnx": str(tmp_path / "step.onnx"),
            "plan": str(tmp_path / "step.plan"),
            "profiles": [{name: (shape, shape, shape) for name, shape in shapes.items()}],
            "plugin_nodes": {},
            "timing_cache": None,
            "architectures": ("sm90",),
        }
        return PlanJob(**given | changes)

    return make
