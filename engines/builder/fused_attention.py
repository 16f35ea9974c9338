"""Fused attention: asked for wherever TensorRT has kernels for it, and told where an engine is left without.

An attention layer is strict (a fused kernel or no engine) unless it is marked decomposable, which hides a fall to
kernels that write the whole score matrix. So a build is strict first where TensorRT's documented limits hold, and only
one that fails is done again with decomposable layers, with a warning and a line in the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx

from cat_pruning.bundle.profiles import PlanProfile

OLDEST_SM: Final = 75
NARROWEST, WIDEST, MULTIPLE = 16, 256, 8  # of a head, in channels
SCORE_BYTES: Final = 2  # fused kernels are 16-bit
_16_BIT: Final = ("HALF", "BF16")


def attention_layers(trt: Any, network: Any) -> list[Any]:
    """The first layer of every attention, whose inputs are queries, keys and values, (B, heads, rows, width)."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]


def why_not_fused(layers: Iterable[Any], architectures: Sequence[str]) -> str | None:
    """Which limit of the fused kernels the layers do not keep; None where all are kept."""
    if old := [name for name in architectures if int(name.removeprefix("sm")) < OLDEST_SM]:
        return f"{', '.join(old)} is older than sm{OLDEST_SM}"
    for layer in layers:
        query = layer.get_input(0)
        dtype, width = query.dtype.name, query.shape[3]
        if dtype not in _16_BIT:
            return f"queries are {dtype}, not of 16 bits"
        if not NARROWEST <= width <= WIDEST or width % MULTIPLE:
            return f"heads are {width} wide, not a multiple of {MULTIPLE} from {NARROWEST} to {WIDEST}"
    return None


def make_decomposable(trt: Any, layers: Iterable[Any]) -> bool:
    """Let several kernels do what no fused one does. False where the bindings cannot say it of a parsed layer."""
    try:
        for layer in layers:
            layer.__class__ = trt.IAttentionInputLayer  # which the network returns as its base class
            layer.attention.decomposable = True
    except (TypeError, AttributeError):
        return False
    return True


def decomposable_path(graph: Path) -> Path:
    """Where `write_decomposable` puts its copy: beside the graph, because external data is found by relative names."""
    return graph.with_name(f".{graph.name}.decomposable")


def write_decomposable(graph: Path) -> Path:
    """A copy of an ONNX graph whose attention nodes say themselves that they may be decomposed.

    The importer reads the attribute TRT_decomposable. The weights are not copied.
    """
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))
    copy = decomposable_path(graph)
    copy.write_bytes(model.SerializeToString())
    return copy


def score_matrix_bytes(layers: Sequence[Any], profiles: Sequence[PlanProfile]) -> int | None:
    """The largest score matrix of a full step, B · heads · rows · rows, 16-bit; None without caches or attention."""
    if not layers:
        return None
    heads = max(layer.get_input(0).shape[1] for layer in layers)
    largest = [_largest(shapes) for shapes in profiles]
    return max((batch * heads * rows * rows * SCORE_BYTES for batch, rows in largest if rows), default=None)


def _largest(shapes: Mapping[str, Any]) -> tuple[int, int]:
    """B and the rows of the largest cache of one profile."""
    caches = [highest for name, (_, _, highest) in shapes.items() if "_cache_" in name]
    batch, rows = max(((int(shape[0]), int(shape[1])) for shape in caches), default=(0, 0))
    return batch, rows
