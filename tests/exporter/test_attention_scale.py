"""What the importer of TensorRT would make of the attention's scale, and what it makes of what we export."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from cat_pruning.exporter.attention_scale import head_scale, scale_queries

WIDTHS = (32, 64, 72, 128)
DTYPES = {torch.bfloat16: ir.DataType.BFLOAT16, torch.float16: ir.DataType.FLOAT16, torch.float32: ir.DataType.FLOAT}
HEADS = 2


def importers_factor(width: int, dtype: torch.dtype, scale: float | None = None) -> float:
    """What scores are multiplied by: the root of the scale twice, as `scaleQKTensor` of onnx-tensorrt computes it."""
    if scale is not None:
        root = torch.tensor(math.sqrt(scale)).to(dtype)
    else:
        root = torch.tensor(float(width), dtype=dtype).sqrt().reciprocal().sqrt()
    assert root.dtype is dtype
    return float(root) ** 2


@pytest.mark.parametrize(("width", "error"), [(32, -0.0025), (64, -0.0002), (72, 0.0027), (128, -0.0029)])
def test_what_is_lost_without_a_scale_of_our_own(width: int, error: float) -> None:
    """In bf16, in every layer. A scale that is given is rounded likewise; a scale of 1 is not."""
    wanted = head_scale(width)
    assert importers_factor(width, torch.bfloat16) / wanted - 1 == pytest.approx(error, abs=1e-4)
    assert importers_factor(width, torch.bfloat16, wanted) / wanted - 1 == pytest.approx(error, abs=1e-4)
    assert all(importers_factor(width, dtype, 1.0) == 1 for dtype in DTYPES)


def projected_attention(width: int, dtype: torch.dtype, *, wide: bool = False) -> ir.Model:
    """rows, key, value -> attention whose queries are a projection of `rows`, or come out of fp32."""
    kind, channels = DTYPES[dtype], HEADS * width
    by_rows, by_heads = ir.Shape(["B", "n", channels]), ir.Shape(["B", HEADS, "n", width])
    rows = ir.Value(name="rows", type=ir.TensorType(ir.DataType.FLOAT if wide else kind), shape=by_rows)
    keys = [
        ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(["B", HEADS, "S", width]))
        for name in ("key", "value")
    ]
    sizes = ir.tensor([0, 0, HEADS, width], dtype=ir.DataType.INT64, name="sizes")
    shape = ir.Value(name="sizes", type=ir.TensorType(sizes.dtype), shape=ir.Shape([4]), const_value=sizes)
    nodes = [ir.node("Cast", [rows], {"to": kind.value}) if wide else ir.node("Neg", [rows])]
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape]))
    nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 2, 1, 3]}))
    nodes.append(ir.node("Attention", [nodes[-1].outputs[0], *keys], {"is_causal": 0}))
    for index, node in enumerate(nodes):
        result = node.outputs[0]
        result.name, result.type = f"value_{index}", ir.TensorType(kind)
        result.shape = [by_rows, ir.Shape(["B", "n", HEADS, width]), by_heads, by_heads][index]
    graph = ir.Graph(
        [rows, *keys],
        [nodes[-1].outputs[0]],
        nodes=nodes,
        initializers=[shape],
        opset_imports={"": 23},
        name="attention",
    )
    return ir.Model(graph, ir_version=10)


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_the_factor_that_we_export_is_off_by_no_more_than_fp32s_rounding(
    width: int, dtype: torch.dtype, wide: bool
) -> None:
    model = projected_attention(width, dtype, wide=wide)
    scale_queries(model)
    (attention,) = [node for node in model.graph if node.op_type == "Attention"]
    (product,) = [node for node in model.graph if node.op_type == "Mul"]
    factor = product.inputs[1]
    assert factor is not None
    assert factor.const_value is not None
    scores = float(factor.const_value.numpy().astype(np.float64)) * importers_factor(
        width, dtype, attention.attributes["scale"].as_float()
    )
    assert abs(scores * math.sqrt(width) - 1) <= 2**-24
    first = product.inputs[0]
    assert first is not None
    if first.dtype is not ir.DataType.FLOAT:
        assert math.log2(head_scale(width)).is_integer()  # a product with a power of two is exact
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


@pytest.mark.parametrize(
    ("width", "dtype", "wide", "expected"),
    [
        (72, torch.bfloat16, False, ["Neg", "Cast", "Mul", "Cast", "Reshape", "Transpose", "Attention"]),
        (64, torch.bfloat16, False, ["Neg", "Mul", "Reshape", "Transpose", "Attention"]),
        (128, torch.bfloat16, True, ["Mul", "Cast", "Reshape", "Transpose", "Attention"]),
        (72, torch.float32, False, ["Neg", "Mul", "Reshape", "Transpose", "Attention"]),
    ],
)
def test_where_the_product_is_made(width: int, dtype: torch.dtype, wide: bool, expected: list[str]) -> None:
    model = projected_attention(width, dtype, wide=wide)
    scale_queries(model)
    assert kinds(model) == expected


def test_a_scale_that_was_given_is_kept() -> None:
    model = projected_attention(64, torch.float32)
    (attention,) = [node for node in model.graph if node.op_type == "Attention"]
    attention.attributes["scale"] = ir.AttrFloat32("scale", 0.3)
    scale_queries(model)
    (factor,) = [each for name, each in model.graph.initializers.items() if name.startswith("query_scale")]
    assert factor.const_value is not None
    assert float(factor.const_value.numpy()) == pytest.approx(0.3)


@pytest.mark.parametrize("width", WIDTHS)
def test_onnx_runtime_computes_what_torch_does(width: int) -> None:
    model = projected_attention(width, torch.float32)
    scale_queries(model)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 5, HEADS * width, generator=generator)
    key, value = torch.randn(2, 2, HEADS, 9, width, generator=generator)
    query = (-rows).unflatten(-1, (HEADS, width)).transpose(1, 2)
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"rows": rows.numpy(), "key": key.numpy(), "value": value.numpy()})
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=0, atol=2e-6)


def test_every_attention_of_an_export_has_scaled_queries(tiny_export: Any) -> None:
    graph = onnx.load(tiny_export.directory / "step.onnx", load_external_data=False).graph
    made_by = {output: node for node in graph.node for output in node.output}
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    for node in attentions:
        (scale,) = [attribute.f for attribute in node.attribute if attribute.name == "scale"]
        assert scale == 1
        producer = made_by[node.input[0]]
        while producer.op_type in ("Reshape", "Transpose"):
            producer = made_by[producer.input[0]]
        assert producer.op_type == "Mul"
        assert producer.input[1].startswith("query_scale_0.35355339")  # heads of 8
    assert attentions
