"""From a torch module to an ONNX graph that refers to its parameters, and to files: no weight is held twice."""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import opset23, optimizer, rewriter
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn

from cat_pruning.plugins.onnx_ops import OPSET_VERSION

Weights = Callable[[str], Tensor]  # name of a parameter of the module -> its value
Advance = Callable[[int, int], None]  # called with (done, total) weights written

WEIGHTS: Final = ("transformer.", "component.")  # what the parameters' names begin with, by the attribute of the module
_RULES = (
    rules.add_0_rule,
    rules.mul_by_1_rule,
    rules.no_op_cast_rule,
    rules.cast_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.unsqueeze_unsqueeze_rule,
)
_INLINE_BYTES = 256  # tensors up to this size lie in the graph's own file


def trace(
    module: nn.Module,
    arguments: Mapping[str, Any],
    dynamic: Mapping[str, Any],
    inputs: Sequence[str],
    outputs: Sequence[str],
    translations: Mapping[Any, Any] | None = None,
) -> ir.Model:
    """A module's forward as one graph whose initializers refer to its parameters. Reads no weight.

    Args:
        module: whose only attribute with parameters is called as `WEIGHTS` says.
        arguments: of `forward`, by name.
        dynamic: the dynamic shapes of them, as `torch.export` takes them.
        inputs: names of the graph's.
        outputs: likewise.
        translations: of operators, besides torch's own.
    """
    with warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")  # torch's own deprecations; nothing that a user could act on
        program = torch.onnx.export(
            module,
            kwargs=dict(arguments),
            dynamo=True,
            opset_version=OPSET_VERSION,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dict(dynamic),
            custom_translation_table={operator.floordiv: _floordiv, **(translations or {})},
            optimize=False,  # it would transpose every weight at once
            verbose=False,
        )
    assert program is not None
    return program.model


def save_graphs(models: Mapping[Path, ir.Model], advance: Advance | None = None) -> None:
    """Write graphs and their weights, `{file}` and `{file}.data`, and let the models go of the weights.

    Args:
        models: by their files.
        advance: called for every weight.

    Raises:
        OSError: a file cannot be written.
    """
    tensors = [value.const_value for model in models.values() for value in model.graph.initializers.values()]
    total = sum(tensor is not None and tensor.nbytes > _INLINE_BYTES for tensor in tensors)
    done = itertools.count(1)

    def report(tensor: ir.TensorProtocol, info: Any) -> None:
        if advance is not None:
            advance(next(done), total)

    for path, model in models.items():
        ir.save(
            model,
            path,
            external_data=f"{path.name}.data",
            size_threshold_bytes=_INLINE_BYTES,
            callback=report,  # for what is not inline
        )
    for model in models.values():
        for value in model.graph.initializers.values():
            value.const_value = (
                None  # onnxscript's rewriter keeps the last graph that it saw; it must not keep the weights
            )


def simplify(model: ir.Model) -> None:
    """Fold and merge what can be, without reading a weight; transposes of weights are done while they are written."""
    _simplify(model)
    _transpose_weights_lazily(model)
    _permute_without_einsum(model)


def forget_origins(model: ir.Model) -> None:
    """Take out stack traces, which have this machine's paths, and the tracer's names for sizes."""
    outputs = set(model.graph.outputs)
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            if value not in outputs:
                value.shape = None  # every runtime infers its own
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _simplify(model: ir.Model) -> None:
    """Fold and merge what can be. As onnxscript's `optimize_ir`, but for its rules that find nothing in a transformer.

    One of those, of two outputs, is tried on all pairs of nodes: half of the time of an export.
    """
    passes.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(
            model, onnx_shape_inference=True, should_fold=lambda node: False if _reads_weight(node) else None
        )
        rewriter.RewritePass(_RULES)(model)
        passes.RemoveUnusedNodesPass()(model)
    for simplify in (
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),  # of what the first one made alike
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        simplify(model)


def replace_weights(model: ir.Model, weights: Weights) -> None:
    """Let the initializers that are parameters have other values, asked for one at a time while they are written."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not isinstance(tensor.raw, torch.nn.Parameter):
            continue
        parameter = name.partition(".")[2]
        value.const_value = ir.LazyTensor(
            functools.partial(_weight, weights, parameter),
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
        )


def _weight(weights: Weights, name: str) -> ir.TensorProtocol:
    return TorchTensor(weights(name), name=name)


def _permute_without_einsum(model: ir.Model) -> None:
    """The einsum of an unpatchify is a Transpose, which unlike Einsum every runtime has in bf16."""
    for node in [node for node in model.graph if node.op_type == "Einsum" and len(node.inputs) == 1]:
        before, after = node.attributes["equation"].as_string().replace(" ", "").split("->")
        if sorted(before) == sorted(set(after)):
            node.op_type = "Transpose"
            node.attributes.clear()
            node.attributes["perm"] = ir.AttrInt64s("perm", [before.index(axis) for axis in after])


def _reads_weight(node: ir.Node) -> bool:
    """Folded, such a node would be a constant of another name in the weight's place, and have read it."""
    names = [value.name or "" for value in node.inputs if value is not None and value.is_initializer()]
    return any(name.startswith(WEIGHTS) for name in names)


def _is_weight_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].is_initializer()


def _transpose_weights_lazily(model: ir.Model) -> None:
    """Replace Transpose(weight) by an initializer that is transposed when it is written, one at a time."""
    for node in [node for node in model.graph if _is_weight_transpose(node)]:
        weight, output = node.inputs[0], node.outputs[0]
        assert weight is not None
        tensor = weight.const_value
        assert tensor is not None
        assert tuple(node.attributes["perm"].as_ints()) == (1, 0)
        name = f"{weight.name}.T"
        if name not in model.graph.initializers:
            rows, columns = tensor.shape.numpy()
            lazy = ir.LazyTensor(
                functools.partial(_transposed, tensor, name),
                dtype=tensor.dtype,
                shape=ir.Shape((columns, rows)),
                name=name,
            )
            model.graph.register_initializer(
                ir.Value(name=name, type=weight.type, shape=ir.Shape((columns, rows)), const_value=lazy)
            )
        output.replace_all_uses_with(model.graph.initializers[name])
        model.graph.remove(node, safe=True)
        if not weight.uses():
            del model.graph.initializers[weight.name or ""]
            weight.const_value = None  # see `save_graphs`: the graph's old values live on


def _transposed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    if isinstance(tensor, ir.LazyTensor):
        tensor = tensor._evaluate()
    weight = tensor.raw  # numpy's transposing copy takes five times as long
    assert isinstance(weight, Tensor), f"{name}: expected a parameter of the module, got {type(weight).__name__}"
    return TorchTensor(weight.detach().t().contiguous(), name=name)


def _floordiv(dividend: Any, divisor: Any) -> Any:
    # Torch's own translation is Div, which rounds -3/2 to -1; then an odd number of token rows crops the position table
    # wrongly. ONNX's Mod has the sign of the divisor, as Python's.
    return opset23.Div(opset23.Sub(dividend, opset23.Mod(dividend, divisor)), divisor)


class _quiet_exporter:
    """Torch's exporter logs what it lacks (torchvision) at every export; nothing that a user could act on."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("torch.onnx")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *exc: object) -> None:
        self.logger.setLevel(self.level)
