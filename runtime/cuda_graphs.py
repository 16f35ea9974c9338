"""Steps captured as CUDA graphs: launched as one, with none of the host's work in between."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from cat_pruning.errors import EngineError

logger = logging.getLogger(__name__)

MOST_GRAPHS = 16  # of one session; the oldest goes first


def capture(body: Callable[[], None], device: torch.device, others: Sequence[Any]) -> Any:
    """Capture what `body` launches on `device`; nothing runs before the graph's `replay`.

    The memory of what is computed on the way is shared with the `others`: no two run at once, and none leaves anything
    there for another. Synchronises.
    """
    graph = torch.cuda.CUDAGraph()
    pool = others[0].pool() if others else None
    # Other threads may allocate meanwhile, for images of their own: their calls must not break this capture.
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        body()
    return graph


class CudaGraphs:
    """The captured steps of one session by what makes them what they are.

    A key's first run is an ordinary one: libraries choose kernels and allocate workspaces then, which must not happen
    in a capture. Its second run captures, and from there on it is replayed. What cannot be captured runs as it is, with
    a warning in the log.

    Args:
        capture: makes a graph; the tests' own where there is no GPU.
    """

    def __init__(self, capture: Callable[[Callable[[], None], torch.device, Sequence[Any]], Any] = capture) -> None:
        self._capture = capture
        self._graphs: dict[Hashable, Any] = {}  # None where the key ran once
        self._impossible = False

    def run(self, key: Hashable, body: Callable[[], None], device: torch.device) -> None:
        """Run `body`, or replay what it launched before under this key. Does not synchronise, but for the capture.

        Args:
            key: equal for bodies that launch the same kernels on the same memory.
            body: launches work on the current stream. Must not synchronise, nor leave results anywhere but in memory
                that existed before.
            device: of the work.
        """
        if self._impossible:
            body()
        elif key not in self._graphs:
            while len(self._graphs) >= MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            body()
            self._graphs[key] = None
        else:
            if self._graphs[key] is None:
                self._graphs[key] = self._captured(body, device)
            graph = self._graphs.get(key)
            body() if graph is None else graph.replay()

    def _captured(self, body: Callable[[], None], device: torch.device) -> Any:
        try:
            return self._capture(body, device, [graph for graph in self._graphs.values() if graph is not None])
        except (RuntimeError, EngineError) as error:
            # Nothing of it ran: a capture only records.
            logger.warning("steps cannot be captured as CUDA graphs and are slower: %s", str(error).splitlines()[0])
            self._impossible = True
            return None

    @property
    def num_captured(self) -> int:
        """Graphs that are there to be replayed."""
        return sum(graph is not None for graph in self._graphs.values())

    def clear(self) -> None:
        """Forget every graph: the memory that they work on is about to go."""
        self._graphs.clear()
