"""What a sampling loop computes again and again from the same inputs leaves the step graph.

An exported step is split by data dependence into three graphs (`cat_pruning.step_io.Part`): nodes that depend on the
prompt only, such as the text projections and PixArt's cross-attention keys and values; nodes that depend on the
timestep and the pooled text only, such as every adaLN modulation; and the rest, which is the step. No node is moved by
name and no family has a say in it, but for which graph each of its inputs belongs to.

Results that the step needs are packed: those of one shape and dtype are stacked on a leading axis, so that hundreds of
modulations are one input, and a slice of it is contiguous.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from cat_pruning.step_io import SYMBOLIC, Part, Shape, StepDims, is_changed_in_place

PartOf = Callable[[str], Part]  # input name -> the graph that it belongs to

# Two sets of sizes with no number in common: a dimension of a result that differs between them is the dynamic
# dimension with these two values, any other one is static.
_SIZES = (
    StepDims.of(batch=101, latent_height=206, latent_width=214, patch_size=2, text_length=109, num_kept=113),
    StepDims.of(batch=127, latent_height=262, latent_width=274, patch_size=2, text_length=139, num_kept=149),
)


@dataclass(frozen=True, slots=True)
class TensorType:
    """An input or output of a graph: its ONNX type and its shape, with dynamic dimensions by name."""

    dtype: ir.DataType
    shape: Shape


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph of a split step."""

    model: ir.Model
    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]


@dataclass(frozen=True, slots=True)
class _Pack:
    """Results of one shape and dtype: the name of the tensor that they are stacked in, and their own."""

    name: str
    spec: TensorType  # of one result
    members: list[str]

    @property
    def packed(self) -> TensorType:
        return TensorType(self.spec.dtype, (len(self.members), *self.spec.shape))


def split_graph(model: ir.Model, shapes: Mapping[str, Shape], part_of: PartOf) -> dict[Part, Graph]:
    """Split the graph of a whole step. Reads no weight; `model` is used up.

    Args:
        model: the step, as `trace_step` returns it.
        shapes: its inputs' shapes by name, dynamic dimensions by the names of `step_io.SYMBOLIC`; outputs
            `{name}_out` have the shapes of the inputs `name`.
        part_of: the graph that each input belongs to.

    Returns:
        A graph for every part. The outputs of `prompt` and `timestep` are inputs of `step`, by the same names. A
        dimension `batch` of `timestep` counts rows of any number of steps.
    """
    parts = _parts_of_values(model.graph, shapes, part_of)
    packs: dict[Part, list[_Pack]] = {}
    graphs: dict[Part, Graph] = {}
    for part in (Part.PROMPT, Part.TIMESTEP):
        results = _results(model.graph, parts, part)
        hoisted = model.clone()
        _keep_outputs(hoisted.graph, results)
        _read_sizes_from(hoisted.graph, shapes)
        packs[part] = _pack(hoisted, part, results, shapes)
        _stack(hoisted.graph, packs[part])
        outputs = {pack.name: pack.packed for pack in packs[part]}
        graphs[part] = _finished(hoisted, shapes, outputs)
    hoisted_values = [pack for part in packs for pack in packs[part]]
    _unstack(model.graph, hoisted_values)
    known = {**shapes, **{pack.name: pack.packed.shape for pack in hoisted_values}}
    _read_sizes_from(model.graph, known)
    outputs = {
        output.name or "": TensorType(_dtype(output), shapes[(output.name or "").removesuffix("_out")])
        for output in model.graph.outputs
    }
    return {**graphs, Part.STEP: _finished(model, known, outputs)}


def _parts_of_values(graph: ir.Graph, shapes: Mapping[str, Shape], part_of: PartOf) -> dict[ir.Value, Part | None]:
    """The part of every value that depends on an input; sizes and constants have none and may be anywhere.

    Anywhere, that is, where the sizes can be read: the number of kept tokens is in no input of the prompt's.
    """
    parts: dict[ir.Value, Part | None] = {value: part_of(value.name or "") for value in graph.inputs}
    sizes: dict[ir.Value, set[object]] = defaultdict(set)  # that a value without a part is computed from
    readable: dict[Part, set[object]] = defaultdict(set)
    for value, part in parts.items():
        readable[part or Part.STEP].update(shapes[value.name or ""])
    for node in graph:
        assert not any(attribute.type in _SUBGRAPHS for attribute in node.attributes.values()), node
        inputs = [value for value in node.inputs if value is not None]
        if _is_size(node):
            parts[node.outputs[0]] = None
            sizes[node.outputs[0]].add(shapes[inputs[0].name or ""][node.attributes["start"].as_int()])
            continue
        depends_on = {part for value in inputs if (part := parts.get(value)) is not None}
        needed = set().union(*(sizes[value] for value in inputs))
        part = depends_on.pop() if len(depends_on) == 1 else (Part.STEP if depends_on else None)
        if part is not None and not needed <= readable[part]:
            part = Part.STEP
        for output in node.outputs:
            parts[output] = part
            if part is None:
                sizes[output] = needed
    return parts


_SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _is_size(node: ir.Node) -> bool:
    """Whether a node reads one dimension of an input; the tracer makes no other ones."""
    return node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].is_graph_input()


def _results(graph: ir.Graph, parts: Mapping[ir.Value, Part | None], part: Part) -> list[str]:
    """The names of what nodes of `part` compute and the step reads, in graph order."""
    names = []
    for node in graph:
        for value in node.outputs:
            if parts[value] is part and any(
                parts[out] is Part.STEP for user in value.consumers() for out in user.outputs
            ):
                names.append(value.name or "")
    return names


def _keep_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    values = {value.name: value for node in graph for value in node.outputs}
    graph.outputs.clear()
    graph.outputs.extend(values[name] for name in names)
    _drop_unused(graph)


def _drop_unused(graph: ir.Graph) -> None:
    """Nodes, inputs and weights that no output needs."""
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for value in [value for value in graph.inputs if not value.uses() and not value.is_graph_output()]:
        graph.inputs.remove(value)
    for value in [value for value in graph.initializers.values() if not value.uses()]:
        del graph.initializers[value.name or ""]
        value.const_value = None  # see `save_graphs`: the graph's old values live on


def _read_sizes_from(graph: ir.Graph, shapes: Mapping[str, Shape]) -> None:
    """Read every size off the first of the graph's own inputs that has it; the tracer took any input of the step.

    Never off one that is changed in place: the scatter is to be its only reader (`cat_pruning.exporter.cache_readers`).
    """
    inputs = {value.name: value for value in graph.inputs if not is_changed_in_place(value.name or "")}
    sources: dict[object, tuple[ir.Value, int]] = {}
    data = {value: [node for node, _ in value.uses() if not _is_size(node)] for value in inputs.values()}
    for name, value in inputs.items():
        for axis, dim in enumerate(shapes[name or ""] if data[value] else ()):
            sources.setdefault(dim, (value, axis))
    shared: dict[object, ir.Value] = {}
    for node in [node for node in graph if _is_size(node)]:
        read = node.inputs[0]
        assert read is not None
        axis = node.attributes["start"].as_int()
        assert node.attributes["end"].as_int() == axis + 1, node
        dim = shapes[read.name or ""][axis]
        assert dim in sources, f"{node}: none of the inputs {', '.join(map(str, inputs))} has the size {dim}"
        if dim in shared:
            node.outputs[0].replace_all_uses_with(shared[dim])
            graph.remove(node, safe=True)
            continue
        source, axis = sources[dim]
        node.replace_input_with(0, source)
        node.attributes["start"] = ir.AttrInt64("start", axis)
        node.attributes["end"] = ir.AttrInt64("end", axis + 1)
        shared[dim] = node.outputs[0]
        if (first := graph[0]) is not node:  # before all who share it
            graph.remove(node)
            graph.insert_before(first, node)
    _drop_unused(graph)


def _pack(model: ir.Model, part: Part, names: Sequence[str], shapes: Mapping[str, Shape]) -> list[_Pack]:
    first, second = (_infer(model, sizes, shapes) for sizes in _SIZES)
    members: dict[TensorType, list[str]] = defaultdict(list)
    for name in names:
        dtype, shape = first[name]
        named = tuple(_dimension(name, a, b) for a, b in zip(shape, second[name][1], strict=True))
        members[TensorType(dtype, named)].append(name)
    return [_Pack(f"{part}_states_{index}", *group) for index, group in enumerate(members.items())]


def _infer(model: ir.Model, sizes: StepDims, shapes: Mapping[str, Shape]) -> dict[str, tuple[ir.DataType, list[int]]]:
    """The types and shapes of the outputs at `sizes`."""
    model = model.clone()
    for value in model.graph.inputs:
        value.shape = ir.Shape(sizes.named(shapes[value.name or ""]))
    names = [value.name or "" for value in model.graph.outputs]
    optimizer.fold_constants(model, onnx_shape_inference=True)
    inferred = {}
    for name, value in zip(names, model.graph.outputs, strict=True):
        assert value.shape is not None, f"the shape of {name} could not be inferred"
        inferred[name] = _dtype(value), [int(dim) for dim in value.shape.numpy()]
    return inferred


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None, f"the type of {value.name} could not be inferred"
    return value.dtype


def _dimension(name: str, first: int, second: int) -> int | str:
    if first == second:
        return first
    for field in fields(StepDims):
        if (first, second) == tuple(getattr(sizes, field.name) for sizes in _SIZES):
            return str(getattr(SYMBOLIC, field.name))
    raise AssertionError(f"{name} has a dimension of {first} at {_SIZES[0]}, which is none of them")


def _stack(graph: ir.Graph, packs: Sequence[_Pack]) -> None:
    """Replace the outputs by the packs, each stacked on a leading axis."""
    values = {value.name: value for value in graph.outputs}
    graph.outputs.clear()
    axes = _constant(graph, "leading_axis", [0])
    for pack in packs:
        columns = [_append(graph, "Unsqueeze", [values[name], axes]) for name in pack.members]
        packed = _append(graph, "Concat", columns, axis=0)
        packed.name = pack.name
        graph.outputs.append(packed)


def _unstack(graph: ir.Graph, packs: Sequence[_Pack]) -> None:
    """Replace the packs' members by slices of new inputs, and drop what computed them."""
    values = {value.name: value for node in graph for value in node.outputs}
    axes = _constant(graph, "leading_axis", [0])
    first = graph[0]
    for pack in packs:
        packed = ir.Value(name=pack.name, type=ir.TensorType(pack.spec.dtype), shape=ir.Shape(pack.packed.shape))
        graph.inputs.append(packed)
        count = len(pack.members)
        split = ir.node("Split", [packed], {"axis": 0, "num_outputs": count}, num_outputs=count)
        nodes = [split, *(ir.node("Squeeze", [output, axes]) for output in split.outputs)]
        graph.insert_before(first, nodes)
        for name, node in zip(pack.members, nodes[1:], strict=True):
            values[name].replace_all_uses_with(node.outputs[0])
    _drop_unused(graph)


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    tensor = ir.tensor(numbers, dtype=ir.DataType.INT64, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(numbers)]), const_value=tensor)
    graph.register_initializer(value)
    return value


def _append(graph: ir.Graph, op_type: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
    node = ir.node(op_type, inputs, attributes)
    graph.append(node)
    return node.outputs[0]


def _finished(model: ir.Model, shapes: Mapping[str, Shape], outputs: dict[str, TensorType]) -> Graph:
    inputs = {value.name or "": TensorType(_dtype(value), shapes[value.name or ""]) for value in model.graph.inputs}
    for value in model.graph.inputs:
        value.shape = ir.Shape(inputs[value.name or ""].shape)
    for value in model.graph.outputs:
        spec = outputs[value.name or ""]
        value.type, value.shape = ir.TensorType(spec.dtype), ir.Shape(spec.shape)
    passes.NameFixPass()(model)
    return Graph(model, inputs, outputs)
