"""The intercepted transformer as ONNX files with external data: prompt.onnx, timestep.onnx and step.onnx.

Every dimension that a request may change is dynamic: batch, height, width, text length, kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from cat_pruning import step_io
from cat_pruning.exporter.attention_scale import scale_queries
from cat_pruning.exporter.cache_readers import check_cache_readers, split_heads_without_sizes
from cat_pruning.exporter.split import Graph, split_graph
from cat_pruning.exporter.tracing import Weights, forget_origins, replace_weights, save_graphs, simplify, trace
from cat_pruning.families.interception import StepModule
from cat_pruning.plugins import onnx_ops
from cat_pruning.step_io import SYMBOLIC, Part, StepDims

Tensors = dict[str, Tensor]


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
    for graph in graphs.values():
        onnx_ops.attach_functions(graph.model)
    save_graphs({directory / part.onnx: graph.model for part, graph in graphs.items()}, advance)
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
    model = trace(
        step,
        arguments,
        _as_arguments(dynamic, num_caches),
        list(shapes),
        step_io.output_names(num_caches),
        onnx_ops.translation_table(),
    )
    if weights is not None:
        replace_weights(model, weights)
    return _finish(model, shapes)


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


def _finish(model: ir.Model, shapes: dict[str, step_io.Shape]) -> ir.Model:
    simplify(model)
    scale_queries(model)
    split_heads_without_sizes(model, shapes)
    for value in model.graph.inputs:
        value.shape = ir.Shape(shapes[value.name or ""])
    for value in model.graph.outputs:
        value.shape = ir.Shape(shapes[(value.name or "").removesuffix("_out")])
    forget_origins(model)
    return model
