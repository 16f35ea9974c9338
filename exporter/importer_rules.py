"""What TensorRT's ONNX importer takes, as rules over our graphs: told before a build of twenty minutes, not by it.

Pinned to TensorRT 10.15, the oldest that we build with: its support matrix and the importer's own checks. The importer
may take an operator that is not listed here; it is reported, because nobody has looked it up.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import NodeProto

from cat_pruning.plugins import DOMAIN
from cat_pruning.plugins.onnx_ops import PLUGIN_ATTRIBUTES
from cat_pruning.step_io import NOISE, is_changed_in_place, output_name

IMPORTER: Final = "TensorRT 10.15"
NEWEST_OPSET: Final = 24
MOST_DIMENSIONS: Final = 8
LARGEST_K: Final = 3840
INDICES: Final = ("INT32", "INT64")

_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
_EIGHT_BITS = ("INT8", "FLOAT8E4M3FN")
_NUMBERS = (*_FLOATS, *INDICES)
_VALUES = (*_NUMBERS, "BOOL")
_PLUGIN = {key: (value,) for key, value in PLUGIN_ATTRIBUTES.items()}


@dataclass(frozen=True, slots=True)
class _Operator:
    """dtypes: of the first input and of the results. attributes: those it may have; values where not all are taken."""

    dtypes: tuple[str, ...]
    attributes: Mapping[str, tuple[object, ...] | None] = field(default_factory=dict)


_NORM = _Operator(_FLOATS, {"axis": None, "epsilon": None, "stash_type": None})
_OPERATORS: Final[dict[tuple[str, str], _Operator]] = {
    (DOMAIN, "TokenGather"): _Operator(_FLOATS, _PLUGIN),
    (DOMAIN, "TokenScatter"): _Operator(_FLOATS, _PLUGIN),
    ("", "Attention"): _Operator(
        _FLOATS, {"is_causal": (0,), "scale": None, "qk_matmul_output_mode": (0,), "softcap": (0.0,)}
    ),
    ("", "Cast"): _Operator(_VALUES, {"to": None}),
    ("", "Concat"): _Operator(_VALUES, {"axis": None}),
    ("", "Constant"): _Operator(_VALUES, {"value": None, "value_int": None, "value_ints": None}),
    ("", "DequantizeLinear"): _Operator((*_FLOATS, *_EIGHT_BITS), {"axis": None}),
    ("", "QuantizeLinear"): _Operator((*_FLOATS, *_EIGHT_BITS), {"axis": None}),
    ("", "Conv"): _Operator(
        _FLOATS,
        {"auto_pad": ("NOTSET",), **dict.fromkeys(("dilations", "group", "kernel_shape", "pads", "strides"))},
    ),
    ("", "Gather"): _Operator(_VALUES, {"axis": None}),
    ("", "GatherND"): _Operator(_VALUES, {"batch_dims": None}),
    ("", "Gelu"): _Operator(_FLOATS, {"approximate": ("none", "tanh")}),
    ("", "Gemm"): _Operator(_FLOATS, dict.fromkeys(("alpha", "beta", "transA", "transB"))),
    ("", "LayerNormalization"): _NORM,
    ("", "Mod"): _Operator(_NUMBERS, {"fmod": (0,)}),
    ("", "RMSNormalization"): _NORM,
    ("", "ReduceMean"): _Operator(_NUMBERS, {"keepdims": None, "noop_with_empty_axes": (0,)}),
    ("", "Reshape"): _Operator(_VALUES, {"allowzero": None}),
    ("", "ScatterND"): _Operator(_NUMBERS, {"reduction": ("none",)}),
    ("", "Shape"): _Operator(_VALUES, {"start": None, "end": None}),
    ("", "Split"): _Operator(_VALUES, {"axis": None, "num_outputs": None}),
    ("", "TopK"): _Operator(_FLOATS, dict.fromkeys(("axis", "largest", "sorted"))),
    ("", "Transpose"): _Operator(_VALUES, {"perm": None}),
    **{("", name): _Operator(_VALUES) for name in ("Expand", "Slice", "Squeeze", "Unsqueeze")},
    **{("", name): _Operator(_NUMBERS) for name in ("Add", "Div", "Mul", "Neg", "Pow", "Range", "Sub")},
    **{("", name): _Operator(_FLOATS) for name in ("Cos", "MatMul", "Reciprocal", "Sigmoid", "Sin", "Sqrt")},
}
_INDEXED = ("Gather", "GatherND", "ScatterND", "TokenGather", "TokenScatter")


class _Types:
    """The dtype and dimensions of every value of a graph, inferred; a dimension is a number, a name or None."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.constants = {tensor.name for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._values: dict[str, tuple[str, list[Any] | None]] = {}
        for tensor in model.graph.initializer:
            self._values[tensor.name] = onnx.TensorProto.DataType.Name(tensor.data_type), list(tensor.dims)
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
            kind = value.type.tensor_type
            dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim]
            name = onnx.TensorProto.DataType.Name(kind.elem_type)
            self._values[value.name] = name, dims if kind.HasField("shape") else None

    def dtype(self, name: str) -> str:
        return self._values.get(name, ("an unknown type", None))[0]

    def dims(self, name: str) -> list[Any] | None:
        return self._values.get(name, ("", None))[1]

    def rank(self, name: str) -> int | None:
        dims = self.dims(name)
        return None if dims is None else len(dims)

    def number(self, name: str) -> int | None:
        """The value of a constant of one element that lies in the graph's own file."""
        tensor = self._initializers.get(name)
        if tensor is None or tensor.external_data:
            return None
        values = onnx.numpy_helper.to_array(tensor).flatten()
        return int(values[0]) if values.size == 1 else None


def importer_findings(path: Path) -> list[str]:
    """What TensorRT's importer would refuse, or take otherwise than we mean, of a graph on disk; in words.

    Reads no weight. Empty where every rule is kept.
    """
    return model_findings(onnx.load(path, load_external_data=False))


def model_findings(model: onnx.ModelProto) -> list[str]:
    """`importer_findings` of a graph in memory."""
    findings = list(_of_the_model(model))
    try:
        model = _inferred(model)
    except onnx.shape_inference.InferenceError as error:
        return [*findings, f"its shapes cannot be inferred: {' '.join(str(error).split())[:300]}"]
    types = _Types(model)
    for node in model.graph.node:
        findings += [f"{_title(node)}: {words}" for words in _of_a_node(node, types)]
    for function in model.functions:
        for node in function.node:
            findings += [f"{function.name}, {_title(node)}: {words}" for words in _of_an_operator(node)]
    return [*findings, *_of_what_is_changed_in_place(model.graph)]


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with every value's type and shape, those of our operators found through their function bodies.

    Under their own domain they have a schema in the exporting process, which says nothing of shapes.
    """
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    for each in (*renamed.graph.node, *renamed.functions, *renamed.opset_import):
        if each.domain == DOMAIN:
            each.domain = f"{DOMAIN}.bodies"
    inferred = onnx.shape_inference.infer_shapes(renamed, strict_mode=True, data_prop=True)
    for each in inferred.graph.node:
        if each.domain == f"{DOMAIN}.bodies":
            each.domain = DOMAIN
    return inferred


def _title(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or (node.output[0] if node.output else '')}".strip()


def _of_the_model(model: onnx.ModelProto) -> Iterator[str]:
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > NEWEST_OPSET:
            yield f"opset {opset.version}, {IMPORTER} knows {NEWEST_OPSET} at most"
    # The importer finds functions by their names alone, and built-in operators too.
    operators = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    for name, count in Counter(function.name for function in model.functions).items():
        if count > 1:
            yield f"{count} functions are named {name}, and the importer goes by the name"
        if name in operators:
            yield f"the function {name} is named like an operator of ONNX, which the importer would take for it"
        if name == model.graph.name:
            yield f"the function {name} is named like the graph"


def _of_an_operator(node: NodeProto) -> Iterator[str]:
    known = _OPERATORS.get((node.domain, node.op_type))
    if known is None:
        yield f"the operator {node.domain or 'onnx'}::{node.op_type} was not looked up for {IMPORTER}"
        return
    for attribute in node.attribute:
        if attribute.name not in known.attributes:
            yield f"its attribute {attribute.name} was not looked up for {IMPORTER}"
            continue
        allowed = known.attributes[attribute.name]
        value = onnx.helper.get_attribute_value(attribute) if not attribute.ref_attr_name else None
        value = value.decode() if isinstance(value, bytes) else value
        if allowed is not None and value not in allowed:
            yield f"{attribute.name} is {value}, expected {' or '.join(map(str, allowed))}"


def _of_a_node(node: NodeProto, types: _Types) -> Iterator[str]:
    yield from _of_an_operator(node)
    known = _OPERATORS.get((node.domain, node.op_type))
    for name in (*node.input[:1], *node.output) if known is not None else ():
        dtype, rank = types.dtype(name), types.rank(name)
        is_index = node.op_type == "TopK" and name in node.output[1:]
        if dtype not in (INDICES if is_index else known.dtypes) and not (node.op_type == "Shape" and dtype == "INT64"):  # type: ignore[union-attr]
            yield f"{name} is {dtype}, expected {', '.join(known.dtypes)}"  # type: ignore[union-attr]
        if rank is None:
            yield f"the rank of {name} is not known"
        elif rank > MOST_DIMENSIONS:
            yield f"{name} has {rank} dimensions, expected {MOST_DIMENSIONS} at most"
    if node.op_type in _INDEXED and types.dtype(node.input[1]) not in INDICES:
        yield f"its indices are {types.dtype(node.input[1])}, expected INT32 or INT64"
    yield from _OF_ONE_OPERATOR.get(node.op_type, _nothing)(node, types)


def _nothing(node: NodeProto, types: _Types) -> Iterator[str]:
    yield from ()


def _of_attention(node: NodeProto, types: _Types) -> Iterator[str]:
    given: list[str] = list(node.input)
    query, key, value, mask, *rest = given + [""] * (4 - len(given))
    if any(rest):
        yield "it has past keys or values"
    if len([name for name in node.output if name]) != 1:
        yield f"it has {len(node.output)} results, expected one"
    for name in (query, key, value, *([mask] if mask else [])):
        if types.rank(name) != 4:
            yield f"{name} has {types.rank(name)} dimensions, expected 4"
        if types.dtype(name) != types.dtype(query):
            yield f"{name} is {types.dtype(name)}, expected the queries' {types.dtype(query)}"
    dims, rows = types.dims(mask) if mask else None, types.dims(query)
    if dims and rows and len(dims) == len(rows) == 4 and dims[2] == 1 != rows[2]:
        yield f"the mask {mask} has one row for all queries, expected one for each"
    scales = [attribute.f for attribute in node.attribute if attribute.name == "scale"]
    if not scales or math.frexp(math.sqrt(scales[0]))[0] != 0.5:
        said = scales[0] if scales else "not given"
        yield f"its scale is {said}: the importer rounds its root to the graph's dtype; expected 1, whose root is exact"


def _of_gemm(node: NodeProto, types: _Types) -> Iterator[str]:
    for name in node.input[:2]:
        if types.rank(name) != 2:
            yield f"{name} has {types.rank(name)} dimensions, expected 2"


def _of_top_k(node: NodeProto, types: _Types) -> Iterator[str]:
    count = types.number(node.input[1])
    if count is None or count > LARGEST_K:
        yield f"K is {'not a constant' if count is None else count}, expected a constant of {LARGEST_K} at most"


def _of_a_reduction(node: NodeProto, types: _Types) -> Iterator[str]:
    if len(node.input) > 1 and node.input[1] and node.input[1] not in types.constants:
        yield "its axes are not a constant"


def _of_first_output(node: NodeProto, types: _Types) -> Iterator[str]:
    if len(node.output) > 1:
        yield f"it has {len(node.output)} results, expected one"


_OF_ONE_OPERATOR: Final[dict[str, Callable[[NodeProto, _Types], Iterator[str]]]] = {
    "Attention": _of_attention,
    "Gemm": _of_gemm,
    "LayerNormalization": _of_first_output,
    "ReduceMean": _of_a_reduction,
    "TopK": _of_top_k,
}


def _of_what_is_changed_in_place(graph: onnx.GraphProto) -> Iterator[str]:
    """The plugin's output lies over its input: nothing else may read that, and nothing else may be bound so."""
    scatters = [node for node in graph.node if (node.domain, node.op_type) == (DOMAIN, "TokenScatter")]
    results = {value.name for value in graph.output}
    reads = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            reads[name].append(node.op_type)
    for scatter in scatters:
        changed = scatter.input[0]
        readers = list(reads[changed])
        if len(readers) > 1 or changed in results:
            readers += ["the graph's results"] if changed in results else []
            yield f"{changed} is changed in place and read by {', '.join(readers)}, expected its scatter alone"
    pairs = {(scatter.input[0], scatter.output[0]) for scatter in scatters}
    for value in graph.input:
        name = value.name
        is_cache = is_changed_in_place(name) and name != NOISE  # the noise's result has memory of its own if need be
        if is_cache and (name, output_name(name)) not in pairs:
            yield f"{name} and {output_name(name)} are bound to one address and are no scatter's pair"
