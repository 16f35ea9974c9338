"""The attention's scale as a product of our own, in fp32: TensorRT's importer would round it.

Where an Attention node gives no `scale`, the importer computes the square root of H^-1/2 (H, the width of a head) in
the graph's dtype and multiplies queries and keys by it. In bf16 every score is then off by -0.29 % at H = 128 (FLUX),
+0.27 % at 72 (PixArt) and -0.25 % at 32; a given `scale` is rounded likewise, unless its root is exact. So the nodes
say `scale = 1`, whose root is exact, and the queries are multiplied by H^-1/2 before.

Why the queries and not the weights of their projections: weights stay what the checkpoint has, so they are mapped and
streamed as before, and a refit gives them as they are. A folded weight in bf16 is rounded
once more, as the product is here, unless H is a power of four, where both are exact. What is paid is a product per
query, which the importer's own two took before.

Where the product is made: above the reshapes and transposes that only move the queries; in front of the cast to the
graph's dtype where they come out of fp32 (FLUX's rotary embedding), at no further rounding; in the graph's dtype where
H^-1/2 is a power of two, which is exact (SD3's 64); else in fp32, rounded once (PixArt's 72).
"""

from __future__ import annotations

import math

import onnx_ir as ir

_LAYOUT = ("Reshape", "Transpose")


def scale_queries(model: ir.Model) -> None:
    """Give every Attention node of `model`, in place, `scale = 1` and queries that are scaled already.

    The values must have the tracer's types and shapes; the new ones have them too.
    """
    for node in [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]:
        query = node.inputs[0]
        assert query is not None
        assert query.shape is not None
        given = node.attributes.get("scale")
        factor = head_scale(query.shape[-1]) if given is None else given.as_float()
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
        _scale(model.graph, _before_layout(query), factor)


def head_scale(width: object) -> float:
    """H^-1/2 for heads of this width."""
    assert isinstance(width, int), f"heads of width {width}: expected a number"
    return float(1 / math.sqrt(width))


def _before_layout(query: ir.Value) -> ir.Value:
    """The values that the queries are, before they are only moved."""
    value = query
    while (producer := value.producer()) is not None and producer.op_type in _LAYOUT and len(value.uses()) == 1:
        moved = producer.inputs[0]
        assert moved is not None
        value = moved
    return value


def _scale(graph: ir.Graph, value: ir.Value, factor: float) -> None:
    """Multiply `value` by `factor`, for all who read it: only the attention does."""
    assert len(value.uses()) == 1, f"{value.name} is read by others than the attention that scales it"
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        wide = producer.inputs[0]
        assert wide is not None
        if wide.dtype is ir.DataType.FLOAT and len(wide.uses()) == 1:
            value = wide
    dtype = value.dtype
    assert dtype is not None
    if dtype is ir.DataType.FLOAT or _is_power_of_two(factor):
        _insert_after(graph, value, [("Mul", dtype)], factor)
    else:
        _insert_after(graph, value, [("Cast", ir.DataType.FLOAT), ("Mul", ir.DataType.FLOAT), ("Cast", dtype)], factor)


def _insert_after(graph: ir.Graph, value: ir.Value, steps: list[tuple[str, ir.DataType]], factor: float) -> None:
    ((reader, index),) = value.uses()
    for op_type, dtype in steps:
        if op_type == "Mul":
            node = ir.node("Mul", [value, _constant(graph, factor, dtype)])
        else:
            node = ir.node("Cast", [value], {"to": dtype.value})
        (result,) = node.outputs
        result.name = f"{value.name}.{'scaled' if op_type == 'Mul' else dtype.name.lower()}"
        result.type, result.shape = ir.TensorType(dtype), value.shape
        graph.insert_before(reader, node)
        value = result
    reader.replace_input_with(index, value)


def _constant(graph: ir.Graph, factor: float, dtype: ir.DataType) -> ir.Value:
    name = f"query_scale_{factor:.9g}_{dtype.name.lower()}"
    if name not in graph.initializers:
        tensor = ir.tensor(factor, dtype=dtype, name=name)
        graph.register_initializer(
            ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([]), const_value=tensor)
        )
    return graph.initializers[name]


def _is_power_of_two(factor: float) -> bool:
    return math.frexp(factor)[0] == 0.5
