"""The double of TensorRT's builder in the builder's place."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from builder_double import Tensorrt

from cat_pruning.engines.builder import plan_builder
from cat_pruning.engines.tensorrt_library import library_log, tensorrt_library


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
