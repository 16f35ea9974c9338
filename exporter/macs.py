"""Multiply-accumulates (MACs) of one step, counted from the exported graph itself.

Two conventions, as papers use both: `linear` counts linear and convolution layers only (the CAT Pruning
paper's tables), `attention` counts what the scores add (Q Kᵀ and P V).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnxscript import optimizer

from cat_pruning.schedule import StepKind, schedule
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Shape


@dataclass(frozen=True, slots=True)
class StepMacs:
    """MACs of one step: linear and convolution layers, and attention scores."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Both conventions together: what a step computes."""
        return self.linear + self.attention


def count_macs(step_onnx: Path, shapes: Mapping[str, Shape]) -> StepMacs:
    """Count the MACs of `step.onnx` at concrete input shapes, by name. The weights are not read."""
    return count_graph_macs(ir.load(step_onnx), shapes)


def count_graph_macs(model: ir.Model, shapes: Mapping[str, Shape]) -> StepMacs:
    """Count the MACs of a step graph, which is changed: its sizes are made constant and folded.

    So every matrix product has its shape.
    """
    for value in model.graph.inputs:
        value.shape = ir.Shape(shapes[value.name or ""])
    for value in model.graph.outputs:
        value.shape = None  # symbolic; inferred below
    optimizer.inline(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    linear = attention = 0
    for node in model.graph:
        if node.domain == "" and node.op_type in _COUNTERS:
            macs, is_linear = _COUNTERS[node.op_type](node)
            linear, attention = (linear + macs, attention) if is_linear else (linear, attention + macs)
    return StepMacs(linear, attention)


def total_macs(full: int, pruned: int, num_steps: int, settings: PruneSettings) -> int:
    """MACs of a whole run of `num_steps`: full and pruned steps as the schedule has them."""
    return sum(full if schedule(step, settings) is StepKind.FULL else pruned for step in range(num_steps))


def _size(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None
    assert value.shape is not None, f"the shape of {value.name} could not be inferred"
    return tuple(int(dim) for dim in value.shape.numpy())


def _matmul(node: ir.Node) -> tuple[int, bool]:
    left, right = node.inputs[0], node.inputs[1]
    assert right is not None
    inner = _size(left)[-1]
    if node.op_type == "Gemm" and node.attributes.get_int("transA", default=False):
        inner = _size(left)[0]
    return math.prod(_size(node.outputs[0])) * inner, right.is_initializer()


def _conv(node: ir.Node) -> tuple[int, bool]:
    kernel = _size(node.inputs[1])  # (C_out, C_in / groups, *window)
    return math.prod(_size(node.outputs[0])) * math.prod(kernel[1:]), True


def _attention(node: ir.Node) -> tuple[int, bool]:
    batch, heads, queries, width = _size(node.inputs[0])
    keys, value_width = _size(node.inputs[1])[2], _size(node.inputs[2])[3]
    return batch * heads * queries * keys * (width + value_width), False


_COUNTERS = {"MatMul": _matmul, "Gemm": _matmul, "Conv": _conv, "Attention": _attention}
