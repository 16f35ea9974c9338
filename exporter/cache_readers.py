"""A cache is read by its scatter alone: TensorRT may copy it around a plugin for the sake of any other reader.

The plugin changes a cache in place (its output is an alias of its input), and at worst such copies move every cache on
every step: 1.3 GB for SD3-medium. The tracer reads sizes off the caches; here they are read elsewhere, or not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common as passes

from cat_pruning.errors import EngineError
from cat_pruning.step_io import NOISE, Dim, Shape, is_changed_in_place


def split_heads_without_sizes(model: ir.Model, shapes: Mapping[str, Shape]) -> None:
    """Split a cache's heads, (B, S, D) -> (B, S, heads, D / heads), by keeping the first two sizes as they are.

    Changes `model` in place. In ONNX a 0 among a Reshape's sizes keeps the size of its input.

    Args:
        model: the step, traced.
        shapes: its inputs' shapes by name, dynamic dimensions by name.
    """
    for node in [node for node in model.graph if node.op_type == "Reshape"]:
        data, sizes = node.inputs[:2]
        scatter, concat = (None if value is None else value.producer() for value in (data, sizes))
        if scatter is None or scatter.op_type != "TokenScatter" or concat is None or concat.op_type != "Concat":
            continue
        cache = scatter.inputs[0]
        rows = shapes.get("" if cache is None else cache.name or "", ())[:2]
        widths = _numbers(concat.inputs[2:])
        if widths is not None and tuple(_size_name(value, shapes) for value in concat.inputs[:2]) == rows:
            node.replace_input_with(1, _constant(model.graph, (0, 0, *widths)))
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)  # torch's exporter says 1: a 0 is a size of 0
    passes.RemoveUnusedNodesPass()(model)


def check_cache_readers(model: ir.Model) -> None:
    """Check that every cache of a step is read by its scatter and by nothing else.

    Raises:
        EngineError: one is; a fault of the exporter.
    """
    for value in model.graph.inputs:
        if not is_changed_in_place(value.name or "") or value.name == NOISE:
            continue
        readers = [node.op_type for node, _ in value.uses()]
        if readers != ["TokenScatter"] or value.is_graph_output():
            raise EngineError(
                f"the exported step reads {value.name} in {', '.join(readers) or 'nothing'}, expected its scatter "
                "alone: TensorRT would copy it on every step",
                "this is a fault of cat-export, please report it",
            )


def _size_name(value: ir.Value | None, shapes: Mapping[str, Shape]) -> Dim | None:
    """The dimension that a node reads off an input of the graph; None for all else."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Shape" or node.inputs[0] is None or not node.inputs[0].is_graph_input():
        return None
    return shapes[node.inputs[0].name or ""][node.attributes["start"].as_int()]


def _numbers(values: Sequence[ir.Value | None]) -> list[int] | None:
    """What constants hold, one after the other; None unless all are constants."""
    numbers: list[int] = []
    for value in values:
        if value is None or value.const_value is None:
            return None
        numbers += [int(number) for number in value.const_value.numpy().flatten()]
    return numbers


def _constant(graph: ir.Graph, sizes: tuple[int, ...]) -> ir.Value:
    name = "sizes_" + "_".join(map(str, sizes))
    if name not in graph.initializers:
        tensor = ir.tensor(sizes, dtype=ir.DataType.INT64, name=name)
        graph.register_initializer(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(sizes)]), const_value=tensor)
        )
    return graph.initializers[name]
