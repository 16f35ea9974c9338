"""The intercepted transformer as ONNX files with external data: prompt.onnx, timestep.onnx and step.onnx.

Every dimension that a request may change is dynamic: batch, height, width, text length, kept tokens.
"""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import opset23, optimizer, rewriter
from onnxscript.rewriter.rules import common as rules
from torch import Tensor

from cat_pruning import step_io
from cat_pruning.exporter.attention_scale import scale_queries
from cat_pruning.exporter.cache_readers import check_cache_readers, split_heads_without_sizes
from cat_pruning.exporter.split import Graph, split_graph
from cat_pruning.families.interception import StepModule
from cat_pruning.plugins import onnx_ops
from cat_pruning.step_io import SYMBOLIC, Part, StepDims

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
Weights = Callable[[str], Tensor]  # name of a parameter of the transformer -> its value

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


def export_step_graph(
    step: StepModule, directory: Path, advance: Callable[[int, int], None] | None = None, weights: Weights | None = None
) -> dict[Part, Graph]:
    """Trace one step, split it and write `{part}.onnx` and `{part}.onnx.data` for every part into `directory`.

    The models have opset 23, their token operators are nodes of the domain `cat`, and their inputs and outputs are
    named and shaped as `cat_pruning.step_io` says. The weights are never held twice: the models' initializers refer to
    the module's parameters, and the transposes that linear layers need are done one tensor at a time, while writing.

    Args:
        step: an intercepted transformer, built with the functional `token_scatter`.
        directory: where the files go.
        advance: called with (done, total) weights written.
        weights: values to write in the place of the module's parameters, asked for one at a time.

    Returns:
        The graphs, without their weights.

    Raises:
        EngineError: a cache has another reader than its scatter.
        OSError: a file cannot be written.
    """
    shapes = step.family.step_shapes(SYMBOLIC)
    graphs = split_graph(trace_step(step, weights), shapes, step.family.part_of)
    check_cache_readers(graphs[Part.STEP].model)
    tensors = [value.const_value for graph in graphs.values() for value in graph.model.graph.initializers.values()]
    total = sum(tensor is not None and tensor.nbytes > _INLINE_BYTES for tensor in tensors)
    done = itertools.count(1)

    def report(tensor: ir.TensorProtocol, info: Any) -> None:
        if advance is not None:
            advance(next(done), total)

    for part, graph in graphs.items():
        onnx_ops.attach_functions(graph.model)
        path = directory / part.onnx
        ir.save(
            graph.model,
            path,
            external_data=f"{path.name}.data",
            size_threshold_bytes=_INLINE_BYTES,
            callback=report,  # for what is not inline
        )
    for graph in graphs.values():
        for value in graph.model.graph.initializers.values():
            value.const_value = (
                None  # onnxscript's rewriter keeps the last graph that it saw; it must not keep the weights
            )
    return graphs


def trace_step(step: StepModule, weights: Weights | None = None) -> ir.Model:
    """A whole step as one graph whose initializers refer to the module's parameters. Reads no weight."""
    shapes = step.family.step_shapes(SYMBOLIC)
    num_caches = len(step.family.caches())
    arguments = _as_arguments(example_inputs(step, _example_dims(step)), num_caches)
    dynamic = {
        name: {axis: torch.export.Dim.AUTO for axis, dim in enumerate(shape) if isinstance(dim, str)}
        for name, shape in shapes.items()
    }
    with warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")  # torch's own deprecations; nothing that a user could act on
        program = torch.onnx.export(
            step,
            kwargs=arguments,
            dynamo=True,
            opset_version=onnx_ops.OPSET_VERSION,
            input_names=list(shapes),
            output_names=step_io.output_names(num_caches),
            dynamic_shapes=_as_arguments(dynamic, num_caches),
            custom_translation_table={operator.floordiv: _floordiv, **onnx_ops.translation_table()},
            optimize=False,  # it would transpose every weight at once
            verbose=False,
        )
    assert program is not None
    if weights is not None:
        _replace_weights(program.model, weights)
    return _finish(program.model, shapes)


def example_inputs(step: StepModule, dims: StepDims, seed: int = 0) -> Tensors:
    """Random inputs of one step at `dims`, by name and in graph order, in the transformer's dtype.

    Indices are distinct within a row; timesteps lie in [0, 1000).
    """
    family = step.family
    dtype = next(step.transformer.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name, shape in family.step_shapes(dims).items():
        numbers = [int(dim) for dim in shape]
        if name == step_io.KEEP_INDICES:
            batch, num_kept = numbers
            order = torch.rand(batch, int(dims.num_tokens), generator=generator).argsort(dim=1)
            tensors[name] = order[:, :num_kept].to(torch.int32).contiguous()
        elif name == step_io.TIMESTEP:
            timestep = torch.rand(1, generator=generator) * family.max_timestep
            tensors[name] = timestep.expand(numbers).contiguous()
        else:
            values = family.example_input(name, numbers, generator)
            tensors[name] = values.to(family.input_dtype(name, dtype))
    return tensors


def run_step(step: StepModule, inputs: Tensors) -> Tensors:
    """Run the intercepted transformer on inputs by name; outputs by the graph's names."""
    num_caches = len(step.family.caches())
    with torch.inference_mode():
        noise, caches = step(**_as_arguments(inputs, num_caches))
    return dict(zip(step_io.output_names(num_caches), [noise, *caches], strict=True))


def _as_arguments(by_name: dict[str, Any], num_caches: int) -> dict[str, Any]:
    """The arguments of `StepModule.forward` from values by input name."""
    caches = step_io.cache_names(num_caches)
    own = {step_io.KEEP_INDICES, step_io.NOISE, *caches}
    return {
        "keep_indices": by_name[step_io.KEEP_INDICES],
        "noise": by_name[step_io.NOISE],
        "caches": [by_name[name] for name in caches],
        "model_inputs": {name: value for name, value in by_name.items() if name not in own},
    }


def _example_dims(step: StepModule) -> StepDims:
    # Small, and no two dimensions alike, so that the tracer cannot take one for another.
    return step.family.dims((6, 5), batch=2, text_length=7, num_kept=11)


def _floordiv(dividend: Any, divisor: Any) -> Any:
    # Torch's own translation is Div, which rounds -3/2 to -1; then an odd number of token rows crops the position table
    # wrongly. ONNX's Mod has the sign of the divisor, as Python's.
    return opset23.Div(opset23.Sub(dividend, opset23.Mod(dividend, divisor)), divisor)


def _finish(model: ir.Model, shapes: dict[str, step_io.Shape]) -> ir.Model:
    _simplify(model)
    _transpose_weights_lazily(model)
    _permute_without_einsum(model)
    scale_queries(model)
    split_heads_without_sizes(model, shapes)
    for value in model.graph.inputs:
        value.shape = ir.Shape(shapes[value.name or ""])
    for value in model.graph.outputs:
        value.shape = ir.Shape(shapes[(value.name or "").removesuffix("_out")])
    outputs = set(model.graph.outputs)
    for node in model.graph:
        node.metadata_props.clear()  # stack traces with this machine's paths
        for value in node.outputs:
            if value not in outputs:
                value.shape = None  # the tracer's names for sizes; every runtime infers its own
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    return model


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


def _replace_weights(model: ir.Model, weights: Weights) -> None:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not isinstance(tensor.raw, torch.nn.Parameter):
            continue
        parameter = name.removeprefix("transformer.")
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
    return any(name.startswith("transformer.") for name in names)


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
            weight.const_value = None  # see `export_step_graph`: the graph's old values live on


def _transposed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    if isinstance(tensor, ir.LazyTensor):
        tensor = tensor._evaluate()
    weight = tensor.raw  # numpy's transposing copy takes five times as long
    assert isinstance(weight, Tensor), f"{name}: expected a parameter of the module, got {type(weight).__name__}"
    return TorchTensor(weight.detach().t().contiguous(), name=name)


class _quiet_exporter:
    """Torch's exporter logs what it lacks (torchvision) at every export; nothing that a user could act on."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("torch.onnx")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *exc: object) -> None:
        self.logger.setLevel(self.level)
