"""The layers of an exported step by their names in the transformer, as outputs of its graphs.

A layer is a linear or convolution module: the graphs' initializers have its name, and so the node that reads its weight
computes its output. What lies between two layers (norms, attention, activations) shows in the next layer's output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from onnx import GraphProto, ValueInfoProto, helper
from torch import Tensor, nn

from cat_pruning.step_io import Part

_PREFIX = "transformer."  # of an initializer's name; the rest is the parameter's
_WEIGHTED = ("MatMul", "Gemm", "Conv")


def layer_outputs(graph: GraphProto) -> dict[str, str]:
    """The name of a graph's tensor -> the layer whose output it is, in the order in which they are computed."""
    weights = {tensor.name for tensor in graph.initializer if tensor.name.startswith(_PREFIX)}
    sums = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    found: dict[str, str] = {}
    for node in graph.node:
        named = [name for name in node.input if name in weights and name.removesuffix(".T").endswith(".weight")]
        if node.op_type not in _WEIGHTED or len(named) != 1:
            continue
        layer = named[0].removesuffix(".T").removesuffix(".weight").removeprefix(_PREFIX)
        output = node.output[0]
        if output in sums and f"{_PREFIX}{layer}.bias" in sums[output].input:
            output = sums[output].output[0]
        found[output] = layer
    uses = Counter(found.values())
    return {output: layer for output, layer in found.items() if uses[layer] == 1}


@contextmanager
def marked_graphs(directory: Path, layers: Mapping[Part, Mapping[str, str]]) -> Iterator[dict[Part, Path]]:
    """Copies of the graphs in `directory` that return the given tensors too.

    They lie beside the graphs, because weights are found by relative names and are not copied, and are removed after
    the block.
    """
    from polygraphy.backend.onnx import modify_outputs, onnx_from_path
    from polygraphy.logger import G_LOGGER

    copies = {part: directory / f".{part.onnx}.layers" for part in Part}
    try:
        for part, copy in copies.items():
            with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
                model = onnx_from_path(str(directory / part.onnx), ignore_external_data=True)
                own = [output.name for output in model.graph.output]
                model.graph.value_info.extend([*model.graph.output, *_typed(model.graph, layers[part])])
                model = modify_outputs(model, outputs=list(dict.fromkeys([*layers[part], *own])))
            copy.write_bytes(model.SerializeToString())
        yield copies
    finally:
        for copy in copies.values():
            copy.unlink(missing_ok=True)


def _typed(graph: GraphProto, layers: Mapping[str, str]) -> Iterator[ValueInfoProto]:
    """The tensors with their types, which are their weights': TensorRT's importer takes no output without one."""
    types = {tensor.name.removesuffix(".T"): tensor.data_type for tensor in graph.initializer}
    for name, layer in layers.items():
        yield helper.make_tensor_value_info(name, types[f"{_PREFIX}{layer}.weight"], None)


@contextmanager
def recorded(transformer: nn.Module, layers: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """What these modules return in the block, by name; of a module that runs twice, the last result."""
    results: dict[str, Tensor] = {}

    def record(name: str, output: Tensor) -> None:
        results[name] = output.detach().clone()

    modules = dict(transformer.named_modules())
    hooks = [
        # Before the hooks of the interception, which change what a module returns.
        modules[name].register_forward_hook(lambda _, __, output, name=name: record(name, output), prepend=True)
        for name in layers
    ]
    try:
        yield results
    finally:
        for hook in hooks:
            hook.remove()
