"""The graphs of a pipeline's text encoders and autoencoder, under ONNX Runtime or as plans, loaded when they are run.

A text encoder runs once per prompt and an autoencoder once per image, so nothing is kept between two runs but the
weights, and those only until `release`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from cat_pruning.bundle.schema import ComponentSpec
from cat_pruning.dtype import DType
from cat_pruning.engines.cuda_graphs import capturing

_DTYPES = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16, "INT32": torch.int32}


class Runner(Protocol):
    """A loaded graph: all outputs by name from all inputs by name, in its dtypes and on its device."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it once; any number of threads at once. Does not synchronise with a GPU."""


class ComponentEngine:
    """A component's graph on a device; any number of threads may run it.

    Args:
        spec: of the graph.
        load: reads the weights, seconds of work for a large one.
        dtype: of the export.
        device: where it computes.
    """

    def __init__(self, spec: ComponentSpec, load: Callable[[], Runner], dtype: DType, device: torch.device) -> None:
        self.spec, self.dtype, self.device = spec, dtype.torch, device
        self._load = load
        self._runner: Runner | None = None
        self._loading = threading.Lock()

    @property
    def is_loaded(self) -> bool:
        """Whether it holds its weights."""
        return self._runner is not None

    def load(self) -> None:
        """Read the weights, unless they are there.

        Raises:
            BundleError, EngineError: the file was changed, or does not load.
        """
        self._loaded()

    def release(self) -> None:
        """Let go of the weights; the next run reads them again. A run in progress on another thread ends as it was."""
        if self._runner is not None:  # each step of an image may ask
            with capturing:  # a plan waits for the device before it goes
                self._runner = None

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs, by name.

        Args:
            inputs: by name, of any floating-point or whole-number dtype and on any device.

        Raises:
            ShapeError: a shape that the graph does not take, or no plan was built for.
            BundleError, EngineError: it cannot be loaded, or fails.
        """
        runner = self._loaded()
        dtypes = {tensor.name: _DTYPES[tensor.dtype] for tensor in self.spec.inputs}
        given = {name: inputs[name].detach().to(self.device, dtype).contiguous() for name, dtype in dtypes.items()}
        self.spec.sizes_of({name: tensor.shape for name, tensor in given.items()})
        return runner(given)

    def _loaded(self) -> Runner:
        with self._loading:  # once, however many threads begin with it
            if (runner := self._runner) is None:
                runner = self._runner = self._load()
            return runner
