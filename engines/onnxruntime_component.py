"""A component's graph under ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cat_pruning.bundle.schema import ComponentSpec
from cat_pruning.components import with_both_sizes
from cat_pruning.engines.onnxruntime_graphs import load_graph, run_graph, run_options
from cat_pruning.engines.side_stream import SideStream


class OnnxRuntimeComponent:
    """A component's graph under ONNX Runtime.

    Args:
        spec: of the graph.
        path: of its file.
        device: the CPU, or a CUDA device.
        pixels_per_latent: the autoencoder's factor.

    Raises:
        EngineError: it does not load.
    """

    def __init__(self, spec: ComponentSpec, path: Path, device: torch.device, pixels_per_latent: int) -> None:
        self._spec, self._device, self._pixels = spec, device, pixels_per_latent
        self._stream, self._options = SideStream(device), run_options(device)
        self._graph = load_graph(path, device, self._stream)

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
