"""Steps captured as CUDA graphs: launched as one, with none of the host's work in between."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from cat_pruning.errors import EngineError

MOST_GRAPHS = 16  # of one session; the oldest goes first


def capture(body: Callable[[], None], device: torch.device) -> Any:
    """Capture what `body` launches on `device`; nothing runs before the graph's `replay`."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate meanwhile, for images of their own: their calls must not break this capture.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        body()
    return graph


class CudaGraphs:
    """The captured steps of one session by what makes them what they are.

    A key's first run is an ordinary one: libraries choose kernels and allocate workspaces then, which must not happen
    in a capture. Its second run captures, and from there on it is replayed.

    Args:
        capture: makes a graph; the tests' own where there is no GPU.
    """

    def __init__(self, capture: Callable[[Callable[[], None], torch.device], Any] = capture) -> None:
        self._capture = capture
        self._graphs: dict[Hashable, Any] = {}  # None where the key ran once

    def run(self, key: Hashable, body: Callable[[], None], device: torch.device) -> None:
        """Run `body`, or replay what it launched before under this key.

        Args:
            key: equal for bodies that launch the same kernels on the same memory.
            body: launches work on the current stream. Must not synchronise, nor leave results anywhere but in memory
                that existed before.
            device: of the work.

        Raises:
            EngineError: the work cannot be captured.
        """
        if key not in self._graphs:
            while len(self._graphs) >= MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            body()
            self._graphs[key] = None
            return
        if self._graphs[key] is None:
            try:
                self._graphs[key] = self._capture(body, device)
            except RuntimeError as error:
                self.clear()
                raise EngineError(
                    f"a step cannot be captured as a CUDA graph ({str(error).splitlines()[0]}); "
                    "load the engine with cuda_graphs=False"
                ) from error
        self._graphs[key].replay()

    def clear(self) -> None:
        """Forget every graph: the memory that they work on is about to go."""
        self._graphs.clear()
