"""Run by tests, in a process of its own: NVIDIA's Python front end takes our plugins as its builder would.

Its bindings want the builder's shared libraries, which are not on PyPI. They load with stubs that define the few
symbols missing from the lean runtime. All that a plugin is asked here runs in NVIDIA's code; only the symbolic
expressions, which the builder makes, are our own, and know their value.

    python tensorrt_probe.py STUBS ANSWERS < questions.json
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

for library in ("libnvinfer.so.11", "libnvonnxparser.so.11", "libnvinfer_plugin.so.11"):
    ctypes.CDLL(str(Path(sys.argv[1]) / library), mode=ctypes.RTLD_GLOBAL)

sys.path.insert(0, sys.argv[1])  # where the package tensorrt is, whose plugins import it

import tensorrt as trt  # noqa: E402
from tensorrt_bindings.plugin import _tensor  # noqa: E402

from cat_pruning.plugins.tensorrt_plugin import callback_errors, register_token_plugins  # noqa: E402


class Expression(trt.IDimensionExpr):  # type: ignore[misc]
    """A dimension that knows its value, and is a constant only if it says so."""

    value: int

    @classmethod
    def of(cls, value: int) -> Expression:
        self = cls.__new__(cls)  # the builder makes them; there is no constructor
        self.value = value
        return self


class KeptExpression(_tensor.SymExprImpl):  # type: ignore[misc]
    """What the builder is handed. It keeps an address of its own making; we keep the expression."""

    def __init__(self, symbolic: Any) -> None:
        super().__init__(symbolic)
        self.kept = symbolic._expr


_tensor.SymExprImpl = KeptExpression


class Expressions:
    """The builder's arithmetic."""

    def constant(self, value: int) -> Expression:
        assert type(value) is int
        return Expression.of(value)

    def operation(self, operation: Any, left: Expression, right: Expression) -> Expression:
        a, b = left.value, right.value
        results = {
            trt.DimensionOperation.SUM: lambda: a + b,
            trt.DimensionOperation.PROD: lambda: a * b,
            trt.DimensionOperation.FLOOR_DIV: lambda: a // b,
        }
        return Expression.of(results[operation]())


def tensor(dims: list[int], dtype: str) -> Any:
    """A tensor as the builder describes it to a plugin; -1 is a dynamic dimension."""
    description = trt.DynamicPluginTensorDesc()
    description.desc = trt.PluginTensorDesc()
    description.desc.dims, description.desc.type = dims, getattr(trt.DataType, dtype)
    description.desc.format = trt.TensorFormat.LINEAR
    return description


def ask(name: str, declared: list[list[int]], dims: list[list[int]], types: list[str]) -> dict[str, Any]:
    """Take one plugin through a build.

    Args:
        name: of the plugin.
        declared: its inputs' and its output's shapes in the network, -1 where they are dynamic.
        dims: the shapes that they have.
        types: their dtypes.
    """
    creator = trt.get_plugin_registry().get_creator(name, "1", "cat")
    fields, phase, request = trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest
    plugin = creator.create_plugin(name, "cat", fields, phase, request.STRICT_AOT)
    num_inputs = len(dims) - 1
    input_types = [getattr(trt.DataType, dtype) for dtype in types[:num_inputs]]
    (output_type,) = plugin.get_output_data_types(input_types, [len(shape) for shape in dims[:num_inputs]])
    inputs = [[Expression.of(dim) for dim in shape] for shape in dims[:num_inputs]]
    plugin.get_output_shapes(inputs, [], Expressions())
    (output,) = plugin.output_descs
    tensors = [tensor(*both) for both in zip(declared, types, strict=True)]
    combinations = plugin.get_supported_format_combinations(tensors, num_inputs)
    plugin.configure_plugin(tensors[:num_inputs], tensors[num_inputs:])
    tactics = plugin.get_valid_tactics()
    plugin.set_tactic(0)
    launch, scalars = SimpleNamespace(), Scalars()
    plugin.get_launch_params(inputs, tensors, num_inputs, launch, scalars, Expressions())
    described = [each.desc for each in tensors]
    kernel, ptx = plugin.get_kernel(described[:num_inputs], described[num_inputs:])
    return {
        "output_type": output_type.name,
        "output_shape": [dim._expr.value for dim in output.shape_expr],
        "aliased_input": plugin.get_aliased_input(0),
        "formats": [(each.type.name, each.format.name) for each in combinations],
        "tactics": tactics,
        "launch": {key: value.kept.value for key, value in vars(launch).items()},
        "scalars": [value.kept.value for value in scalars.values],
        "kernel": kernel,
        "ptx": ptx.decode(),
    }


class Scalars:
    """Where the front end puts the scalars of a launch."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    @property
    def nbSymExprs(self) -> int:
        return len(self.values)

    @nbSymExprs.setter
    def nbSymExprs(self, count: int) -> None:
        self.values = [None] * count

    def __setitem__(self, index: int, value: Any) -> None:
        self.values[index] = value


def main() -> None:
    """Register the plugins twice, then answer every question; an answer may be an error."""
    register_token_plugins(trt)
    register_token_plugins(trt)
    registered = [(each.name, each.plugin_namespace, each.plugin_version) for each in creators()]
    answers = []
    for question in json.load(sys.stdin):
        try:
            answers.append(ask(**question))
        except Exception as error:  # noqa: BLE001  # as TensorRT does
            answers.append({"error": f"{type(error).__name__}: {error}"})
    answer = {"registered": registered, "answers": answers, "callback_errors": callback_errors}
    Path(sys.argv[2]).write_text(json.dumps(answer))  # TensorRT itself writes to stdout


def creators() -> list[Any]:
    """Those of our namespace in TensorRT's registry."""
    return [each for each in trt.get_plugin_registry().all_creators if each.plugin_namespace == "cat"]


if __name__ == "__main__":
    main()
