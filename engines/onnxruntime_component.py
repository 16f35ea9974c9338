"""A component's graph under ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from cat_pruning.bundle.schema import ComponentSpec
from cat_pruning.components import with_both_sizes
from cat_pruning.engines.onnxruntime_graphs import load_graph, run_graph, run_options
from cat_pruning.engines.side_stream import SideStream
from cat_pruning.errors import BundleError

_TYPES: Final = {
    "FLOAT": "tensor(float)", "FLOAT16": "tensor(float16)", "BFLOAT16": "tensor(bfloat16)", "INT32": "tensor(int32)",
}  # fmt: skip  # of ONNX Runtime, by ONNX's names


class OnnxRuntimeComponent:
    """A component's graph under ONNX Runtime.

    Args:
        spec: of the graph.
        path: of its file.
        device: the CPU, or a CUDA device.
        pixels_per_latent: the autoencoder's factor.

    Raises:
        EngineError: it does not load.
        BundleError: it is not the graph that the manifest says.
    """

    def __init__(self, spec: ComponentSpec, path: Path, device: torch.device, pixels_per_latent: int) -> None:
        self._spec, self._device, self._pixels = spec, device, pixels_per_latent
        self._stream, self._options = SideStream(device), run_options(device)
        self._graph = load_graph(path, device, self._stream)
        found = {
            (value.name, value.type, *value.shape) for value in (*self._graph.get_inputs(), *self._graph.get_outputs())
        }
        if found != {(tensor.name, _TYPES[tensor.dtype], *tensor.shape) for tensor in (*spec.inputs, *spec.outputs)}:
            raise BundleError(f"{path} has other inputs or outputs than the manifest says", "run cat-export again")

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Runner`."""
        return run_graph(
            self._graph,
            inputs,
            self._device,
            self._stream,
            self._options,
            self._spec.file,
            lambda sizes: with_both_sizes(sizes, self._pixels),
        )
