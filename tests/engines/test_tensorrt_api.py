"""What the runtime asks of TensorRT exists in the real ones; what the real TensorRT-RTX answers without a GPU."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorrt_double
import torch

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.engines.builder.build import can_build
from cat_pruning.engines.plan import Plan
from cat_pruning.errors import EngineError
from cat_pruning.names import FLAVOURS
from cat_pruning.runtime.engine_choice import engine_from_bundle

needs_rtx = pytest.mark.skipif(
    not can_build("tensorrt_rtx"), reason="TensorRT-RTX is not installed; install '.[tensorrt-rtx]'"
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

# What the runtime takes only where the flavour is TensorRT-RTX.
ONLY_IN_RTX = {
    "DynamicShapesKernelSpecializationStrategy": None,
    "IRuntimeCache": None,
    "IRuntimeConfig": {"create_runtime_cache", "set_runtime_cache", "dynamic_shapes_kernel_specialization_strategy"},
}


def signatures(module: Any, names: dict[str, list[str]]) -> dict[str, dict[str, list[list[str]] | None]]:
    """The parameters of every overload of every name, [] for what is no method, None for what is not there."""
    found: dict[str, dict[str, list[list[str]] | None]] = {}
    for class_name, members in names.items():
        cls = getattr(module, class_name, None)
        found[class_name] = {}
        for member in members:
            if cls is None or not hasattr(cls, member):
                found[class_name][member] = None
                continue
            lines = re.findall(rf"{member}\(self[^)]*\)", getattr(cls, member).__doc__ or "")
            found[class_name][member] = [re.findall(r"(\w+): ", line)[1:] for line in lines]
    return found


def double_parameters(class_name: str, member: str) -> list[str]:
    method = getattr(getattr(tensorrt_double, class_name), member, None)
    return list(inspect.signature(method).parameters)[1:] if inspect.isfunction(method) else []


def missing(found: dict[str, dict[str, list[list[str]] | None]], allowed: dict[str, Any]) -> list[str]:
    """The names of the double that the real module has not got, or has with other parameters."""
    problems = []
    for class_name, members in found.items():
        for member, overloads in members.items():
            optional = class_name in allowed and (allowed[class_name] is None or member in allowed[class_name])
            if overloads is None:
                problems += [] if optional else [f"{class_name}.{member}"]
                continue
            mine = double_parameters(class_name, member)
            if mine and not any(theirs[: len(mine)] == mine for theirs in overloads):
                problems.append(f"{class_name}.{member}({', '.join(mine)}), the real one has {overloads}")
    return problems


@needs_rtx
def test_tensorrt_rtx_has_every_name() -> None:
    names = tensorrt_double.public_names()
    assert sum(map(len, names.values())) > 25
    assert missing(signatures(importlib.import_module("tensorrt_rtx"), names), {}) == []


def test_tensorrt_has_every_name(python_with_bindings: Callable[[str], str]) -> None:
    names = tensorrt_double.public_names()
    program = f"import json, re\nfrom typing import Any\nimport tensorrt_bindings\n{inspect.getsource(signatures)}\n"
    program += f"print(json.dumps(signatures(tensorrt_bindings, {names!r})))"
    assert missing(json.loads(python_with_bindings(program)), ONLY_IN_RTX) == []


def test_a_name_that_is_not_there_would_be_seen() -> None:
    class Module:
        class ICudaEngine:
            def get_tensor_name(self) -> None:
                """get_tensor_name(self: ICudaEngine, position: int) -> str."""

    names = {"ICudaEngine": ["get_tensor_name", "frobnicate"], "IExecutionContext": ["execute_async_v3"]}
    problems = missing(signatures(Module, names), {})
    assert len(problems) == 3
    assert "position" in problems[0]


@needs_rtx
@without_gpu
def test_the_real_tensorrt_rtx_refuses_a_real_plan_in_words(mini_bundle: Path) -> None:
    """And the process lives."""
    plans = Bundle.open(mini_bundle).manifest.plans
    for plan in plans:
        with pytest.raises(EngineError, match=r"TensorRT-RTX [\d.]+ cannot load it: .*CUDA"):
            Plan("tensorrt_rtx", mini_bundle / plan.file, torch.device("cpu"))


@pytest.mark.parametrize("engine", FLAVOURS)
@without_gpu
def test_an_engine_that_cannot_run_here(mini_bundle: Path, engine: str) -> None:
    remedy = r"pip install 'cat-pruning\[tensorrt\]'|runs on an NVIDIA GPU, and torch can use none here"
    with pytest.raises(EngineError, match=remedy):
        engine_from_bundle(Bundle.open(mini_bundle), engine)
