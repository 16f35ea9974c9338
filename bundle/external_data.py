"""The files beside an ONNX graph that it takes its weights from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cat_pruning.errors import BundleError


def external_files(graph: Path) -> list[str]:
    """The names of the files that a graph's tensors lie in, as the graph spells them, in order.

    Raises:
        BundleError: it is no graph.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(graph, load_external_data=False)
    except (OSError, ValueError, DecodeError) as error:
        raise BundleError(f"{graph} cannot be read ({error})", "run cat-export again") from error
    bodies = [model.graph, *model.functions]
    locations = {
        entry.value: None
        for body in bodies
        for tensor in _tensors(body)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return list(locations)


def _tensors(body: Any) -> Iterator[Any]:
    """Of a graph or a function: its initializers, its nodes' constants, and those of the graphs within nodes."""
    yield from getattr(body, "initializer", ())
    for sparse in getattr(body, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in body.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            if inner.node or inner.initializer:
                yield from _tensors(inner)
