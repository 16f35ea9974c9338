"""The products of a step between pairs of QuantizeLinear and DequantizeLinear, with ranges that were calibrated.

A product X W becomes dq(q(X / s)) dq(q(s W)), which ONNX Runtime, TensorRT and TensorRT-RTX compute in eight bits:

* int8: s_j = sqrt(x_j / w_j), where x_j and w_j are the largest magnitudes of the j-th channel of the rows and of the
  weights (SmoothQuant, Xiao et al. 2022, with alpha = 1/2). Products of the same rows share s.
* fp8 (e4m3fn): s = 1, because the format's values are as dense at every magnitude.

q divides by a scale and rounds to the nearest value of the format, ties to even, and takes what is outside to its ends.
There is one scale for the rows, so that max_j x_j / s_j is the largest value, and one for each output channel of the
weights. The rows' scale in fp8 is the next larger power of two: TensorRT-RTX multiplies by its inverse in the step's
dtype, which is exact then. Scales are in the step's dtype, as TensorRT-RTX wants them, and zero points are zero.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from cat_pruning.errors import EngineError
from cat_pruning.exporter.tracing import save_graphs
from cat_pruning.names import Quantization

Floats = NDArray[np.float32]

_LARGEST: Final = {Quantization.INT8_CALIBRATED: 127.0, Quantization.FP8: 448.0}
_DTYPES: Final = {Quantization.INT8_CALIBRATED: ir.DataType.INT8, Quantization.FP8: ir.DataType.FLOAT8E4M3FN}
_SMALLEST: Final = 1e-6  # of what a channel reaches, so that no scale is zero


def write_pairs(
    path: Path, out: Path, nodes: Collection[str], ranges: Mapping[str, Floats], quantization: Quantization
) -> None:
    """Write the graph at `path` to `out` with pairs around `nodes`. Weights are read and written one at a time.

    Args:
        path: a step in fp32, fp16 or bf16, with its weights beside it.
        out: in another directory.
        nodes: matrix products with constant weights, by name.
        ranges: by the name of each product's weights: what each channel of its rows reaches, (D,).
        quantization: `INT8_CALIBRATED` or `FP8`.

    Raises:
        EngineError: a product whose rows were not seen.
        OSError: a file cannot be read or written.
    """
    model = ir.load(path)
    groups: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if node.name in nodes:
            groups[_input(node, 0)].append(node)
    for products in groups.values():
        _quantize(model.graph, products, ranges, quantization)
    save_graphs({out: model})


def _quantize(
    graph: ir.Graph, products: list[ir.Node], ranges: Mapping[str, Floats], quantization: Quantization
) -> None:
    """Put pairs around products of the same rows."""
    rows, weights = _input(products[0], 0), [_input(product, 1) for product in products]
    if unseen := [value.name for value in weights if value.name not in ranges]:
        raise EngineError(
            f"calibration: no image of it used {unseen[0]}", "leave it unquantized (--unquantized), and report it"
        )
    dtype = _dtype(weights[0])
    reached = np.maximum.reduce([ranges[str(value.name)] for value in weights])
    smoothing = None
    if quantization is Quantization.INT8_CALIBRATED:
        inverse = (1 / _smoothing(reached, weights)).astype(dtype.numpy())
        smoothing = np.reciprocal(inverse.astype(np.float32))  # what the graph divides by: rounded, in 16 bits
        reached = reached / smoothing
        factors = _constant(graph, f"{weights[0].name}.smoothing", inverse)
        rows = _insert(graph, products[0], ir.node("Mul", [rows, factors]))
    scale = _scale(float(reached.max()), quantization)
    # ONNX Runtime makes a product of integers only of one that has its rows' pair for itself, with its own constants.
    shared = _rows(graph, rows, products[0], scale, quantization) if dtype is not ir.DataType.FLOAT else None
    for product in products:
        quantized = _rows(graph, rows, product, scale, quantization) if shared is None else shared
        product.replace_input_with(1, _columns(graph, product, smoothing, quantization))
        product.replace_input_with(0, quantized)


def _smoothing(reached: Floats, weights: list[ir.Value]) -> Floats:
    """(D,): what each channel of the rows is divided by, and of the weights multiplied with."""
    largest = np.maximum.reduce([np.abs(_read(value)).max(axis=1) for value in weights])
    smoothing: Floats = np.sqrt(np.maximum(reached, _SMALLEST) / np.maximum(largest, _SMALLEST))
    return smoothing


def _scale(largest: float, quantization: Quantization) -> float:
    scale = max(largest, _SMALLEST) / _LARGEST[quantization]
    return scale if quantization is Quantization.INT8_CALIBRATED else 2.0 ** math.ceil(math.log2(scale))


def _rows(graph: ir.Graph, rows: ir.Value, product: ir.Node, of_rows: float, quantization: Quantization) -> ir.Value:
    """The rows through a pair, which is put before a product."""
    weights = _input(product, 1)
    scale = _constant(graph, f"{weights.name}.rows_scale", np.asarray(of_rows, _dtype(weights).numpy()))
    zero = _constant(graph, f"{weights.name}.rows_zero", np.zeros((), _DTYPES[quantization].numpy()))
    eight_bits = _insert(graph, product, ir.node("QuantizeLinear", [rows, scale, zero]))
    return _insert(graph, product, ir.node("DequantizeLinear", [eight_bits, scale, zero]))


def _columns(graph: ir.Graph, product: ir.Node, smoothing: Floats | None, quantization: Quantization) -> ir.Value:
    """A product's weights in eight bits under their own name, dequantized before it."""
    weights = _input(product, 1)
    name, tensor, dtype, eight_bits = str(weights.name), weights.const_value, _dtype(weights), _DTYPES[quantization]
    assert tensor is not None
    read = functools.partial(_smoothed, tensor, smoothing)
    largest = np.maximum(np.abs(read()).max(axis=0), _SMALLEST)
    scales = (largest / _LARGEST[quantization]).astype(dtype.numpy())
    if graph.initializers.get(name) is weights:  # which other rows may be multiplied with too
        graph.initializers.pop(name)
    rounded = functools.partial(_rounded, read, scales, eight_bits)
    quantized = _initializer(graph, name, ir.LazyTensor(rounded, eight_bits, ir.Shape(tensor.shape.numpy())))
    scale = _constant(graph, f"{name}.scale", scales)
    zero = _constant(graph, f"{name}.zero", np.zeros(scales.shape, eight_bits.numpy()))
    return _insert(graph, product, ir.node("DequantizeLinear", [quantized, scale, zero], {"axis": 1}))


def _smoothed(tensor: ir.TensorProtocol, smoothing: Floats | None) -> Floats:
    """Weights (D, E), in fp32, times what their rows are divided by."""
    values: Floats = tensor.numpy().astype(np.float32)
    return values if smoothing is None else values * smoothing[:, None]


def _rounded(read: Callable[[], Floats], scales: NDArray[Any], dtype: ir.DataType) -> ir.TensorProtocol:
    values = read() / scales.astype(np.float32)
    if dtype is ir.DataType.INT8:
        return ir.tensor(np.clip(np.rint(values), -127, 127).astype(np.int8))
    return ir.tensor(np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn))


def _insert(graph: ir.Graph, before: ir.Node, node: ir.Node) -> ir.Value:
    graph.insert_before(before, node)
    return node.outputs[0]


def _constant(graph: ir.Graph, name: str, values: NDArray[Any]) -> ir.Value:
    return _initializer(graph, name, ir.tensor(values))


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A tensor under a name; under a new one where that is taken, as of weights that two products have."""
    taken = graph.initializers
    numbered = (f"{name}.{number}" for number in itertools.count(1))
    tensor.name = next(each for each in itertools.chain([name], numbered) if each not in taken)
    shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
    value = ir.Value(name=tensor.name, type=kind, shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None
    return value


def _read(weights: ir.Value) -> Floats:
    assert weights.const_value is not None
    return _smoothed(weights.const_value, None)


def _dtype(weights: ir.Value) -> ir.DataType:
    assert weights.const_value is not None
    return weights.const_value.dtype
