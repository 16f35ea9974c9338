"""Multiply-accumulates (MACs), counted from the exported graphs themselves.

Two conventions, as papers use both: `linear` counts linear and convolution layers only (the CAT Pruning
paper's tables), `attention` counts what the scores add (Q Kᵀ and P V).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer

from cat_pruning.schedule import StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Shape
from cat_pruning.timeline import step_kinds


@dataclass(frozen=True, slots=True)
class Macs:
    """MACs of one run of a graph: linear and convolution layers, and attention scores."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Both conventions together: what is computed."""
        return self.linear + self.attention


def count_macs(onnx: Path, shapes: Mapping[str, Shape]) -> Macs:
    """Count the MACs of a graph at concrete input shapes, by name. The weights are not read."""
    return count_graph_macs(ir.load(onnx), shapes)


def count_graph_macs(model: ir.Model, shapes: Mapping[str, Shape]) -> Macs:
    """Count the MACs of a graph, which is changed: its sizes are made constant and folded.

    So every matrix product has its shape.
    """
    for value in model.graph.inputs:
        value.shape = ir.Shape(shapes[value.name or ""])
    for value in model.graph.outputs:
        value.shape = None  # symbolic; inferred below
    _unblock(model)
    optimizer.inline(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    linear = attention = 0
    for node in model.graph:
        if node.domain == "" and node.op_type in _COUNTERS:
            macs, is_linear = _COUNTERS[node.op_type](node)
            linear, attention = (linear + macs, attention) if is_linear else (linear, attention + macs)
    return Macs(linear, attention)


@dataclass(frozen=True, slots=True)
class ImageMacs:
    """What the parts of an image's sampling cost, in one convention.

    full, pruned: the step's graph, all tokens and the kept ones. prompt: once per image. timestep: for every step.
    """

    full: int
    pruned: int
    prompt: int
    timestep: int

    def unpruned(self, num_steps: int) -> int:
        """MACs of the untouched model, which computes everything on every step."""
        return num_steps * (self.full + self.prompt + self.timestep)

    def pruned_image(self, num_steps: int, settings: PruneSettings) -> int:
        """MACs of a split and pruned run: full and pruned steps as the schedule has them."""
        cost = {StepKind.FULL: self.full, StepKind.PRUNED: self.pruned, StepKind.FORECAST: 0}
        steps = sum(cost[kind] for kind in step_kinds(num_steps, settings))
        return self.prompt + num_steps * self.timestep + steps


def _unblock(model: ir.Model) -> None:
    """Make of each `MatMulNBits`, whose shapes ONNX does not infer, the product of fp32 weights that it stands for."""
    for node in [node for node in model.graph if node.op_type == "MatMulNBits"]:
        rows, columns = (node.attributes.get_int(name) for name in ("K", "N"))
        shape = ir.Shape((rows, columns))
        zeros = ir.LazyTensor(
            functools.partial(_zeros, rows, columns), ir.DataType.FLOAT, shape, name=f"{node.name}_weights"
        )
        weights = ir.Value(name=zeros.name, type=ir.TensorType(zeros.dtype), shape=shape, const_value=zeros)
        model.graph.register_initializer(weights)
        product = ir.node("MatMul", [node.inputs[0], weights])
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [product], node.outputs, product.outputs)


def _zeros(rows: int, columns: int) -> ir.TensorProtocol:
    return ir.tensor(np.zeros((rows, columns), np.float32))


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
    dequantized = right.producer()
    if dequantized is not None and dequantized.op_type == "DequantizeLinear":
        right = dequantized.inputs[0]
        assert right is not None
    return math.prod(_size(node.outputs[0])) * inner, right.is_initializer()


def _conv(node: ir.Node) -> tuple[int, bool]:
    kernel = _size(node.inputs[1])  # (C_out, C_in / groups, *window)
    return math.prod(_size(node.outputs[0])) * math.prod(kernel[1:]), True


def _attention(node: ir.Node) -> tuple[int, bool]:
    batch, heads, queries, width = _size(node.inputs[0])
    keys, value_width = _size(node.inputs[1])[2], _size(node.inputs[2])[3]
    return batch * heads * queries * keys * (width + value_width), False


_COUNTERS = {"MatMul": _matmul, "MatMulInteger": _matmul, "Gemm": _matmul, "Conv": _conv, "Attention": _attention}
