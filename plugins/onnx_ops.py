"""The token operators in ONNX: nodes `cat::TokenGather` and `cat::TokenScatter` with function bodies.

A runtime that knows the domain `cat` takes its own kernel; every other one (ONNX Runtime,
`onnx.reference`, TensorRT-RTX) takes the function body, written over GatherND and ScatterND
because ScatterElements would need the indices expanded to every channel.

TensorRT >= 10.15 prefers a plugin over the function only if the node itself carries
`plugin_namespace`; so each node carries `PLUGIN_ATTRIBUTES` and each function declares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset

from cat_pruning.plugins import (
    DOMAIN,
    token_ops,  # noqa: F401  (registers torch.ops.cat)
)

DOMAIN_VERSION = 1
OPSET_VERSION = 23  # the first with the operator Attention
PLUGIN_ATTRIBUTES: dict[str, str | int] = {"plugin_namespace": "cat", "plugin_version": "1", "aot": 1}

_DECLARED = '<plugin_namespace: string = "cat", plugin_version: string = "1", aot: int = 1>'
_BODIES = (
    f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET_VERSION}]>
TokenGather {_DECLARED} (tokens, indices) => (gathered)
{{
    channel_axis = Constant <value_ints = [2]> ()
    wide_indices = Cast <to = 7> (indices)
    columns = Unsqueeze (wide_indices, channel_axis)
    gathered = GatherND <batch_dims = 1> (tokens, columns)
}}
""",
    f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET_VERSION}]>
TokenScatter {_DECLARED} (tokens, indices, rows) => (scattered)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    batch_axis = Constant <value_ints = [0]> ()
    channel_axis = Constant <value_ints = [2]> ()
    trailing_axes = Constant <value_ints = [1, 2]> ()
    batch_shape = Shape <start = 0, end = 1> (indices)
    batch = Squeeze (batch_shape, batch_axis)
    batch_range = Range (zero, batch, one)
    batch_column = Unsqueeze (batch_range, trailing_axes)
    wide_indices = Cast <to = 7> (indices)
    columns = Unsqueeze (wide_indices, channel_axis)
    columns_shape = Shape (columns)
    batch_columns = Expand (batch_column, columns_shape)
    coordinates = Concat <axis = 2> (batch_columns, columns)
    scattered = ScatterND (tokens, coordinates, rows)
}}
""",
)
_OPSET = Opset(DOMAIN, DOMAIN_VERSION)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` of `torch.onnx.export`: the torch operators as nodes of our domain.

    Registers the operators' schemas with onnx, once per process.
    """
    _register_schemas()
    return {
        torch.ops.cat.token_gather.default: lambda tokens, indices: _OPSET.TokenGather(
            tokens, indices, **PLUGIN_ATTRIBUTES
        ),
        torch.ops.cat.token_scatter.default: lambda tokens, indices, rows: _OPSET.TokenScatter(
            tokens, indices, rows, **PLUGIN_ATTRIBUTES
        ),
    }


def attach_functions(model: ir.Model) -> None:
    """Give `model`, in place, the function bodies of the token operators.

    After the export and not during it: the exporter's optimizer inlines the functions that it sees.
    """
    for text in _BODIES:
        function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = DOMAIN_VERSION


def _register_schemas() -> None:
    if onnx.defs.has("TokenGather", DOMAIN):
        return
    tokens, indices = ("tokens", "T"), ("indices", "I")
    for name, inputs in (("TokenGather", (tokens, indices)), ("TokenScatter", (tokens, indices, ("rows", "T")))):
        onnx.defs.register_schema(
            OpSchema(
                name,
                DOMAIN,
                DOMAIN_VERSION,
                inputs=[OpSchema.FormalParameter(parameter, kind) for parameter, kind in inputs],
                outputs=[OpSchema.FormalParameter("out", "T")],
                type_constraints=[
                    ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "the token rows"),
                    ("I", ["tensor(int32)", "tensor(int64)"], "the token indices"),
                ],
                attributes=[
                    OpSchema.Attribute(key, onnx.helper.make_attribute(key, value), "which TensorRT plugin serves it")
                    for key, value in PLUGIN_ATTRIBUTES.items()
                ],
            )
        )
