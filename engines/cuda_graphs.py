"""Steps captured as CUDA graphs: launched as one, with none of the host's work in between."""

from __future__ import annotations

import functools
import gc
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cat_pruning.errors import EngineError

logger = logging.getLogger(__name__)

MOST_GRAPHS = 16  # of one session
MOST_FAILURES = 2


# Torch allows one capture at a time in a process. No step of another thread may be launched in between, nor whatever
# waits for the whole device.
capturing = threading.RLock()


def capture(body: Callable[[], None], device: torch.device, others: Sequence[Any]) -> Any:
    """Capture what `body` launches on `device`; nothing runs before the graph's `replay`. Synchronises.

    The memory of what is computed on the way is shared with the `others`: no two run at once, and none leaves anything
    there for another. No memory is shared with any other graph, which may run at the same time: cuBLAS has a workspace
    for each thread and stream, which a later capture, for another session, would find and use too. So it goes back to
    the memory of this graph.

    Raises:
        RuntimeError: the capture failed. Then the memory of the `others` is lost for captures to come.
    """
    graph = torch.cuda.CUDAGraph()
    pool = others[0].pool() if others else None
    with capturing, torch.cuda.device(device), _no_garbage_collection():
        before = torch.cuda.current_stream()
        try:
            # Other threads may allocate meanwhile, for images of their own: their calls must not break this capture.
            with torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"):
                try:
                    body()
                finally:
                    torch._C._cuda_clearCublasWorkspaces()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
    return graph


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to capture on.

    Torch's own default belongs to whichever device captured first. This one has high priority, which no other stream
    of the process has.
    """
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What is collected may free memory of the device, which breaks a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CudaGraphs:
    """The captured steps of one session by what makes them what they are.

    A key's first run is an ordinary one: libraries choose kernels and allocate workspaces then, which must not happen
    in a capture. Its second run captures, and from there on it is replayed. After `MOST_FAILURES` captures that failed
    there are no more, with a warning in the log: what was not captured by then runs as it is.

    Args:
        capture: makes a graph; the tests' own where there is no GPU.
    """

    def __init__(self, capture: Callable[[Callable[[], None], torch.device, Sequence[Any]], Any] = capture) -> None:
        self._capture = capture
        self._graphs: dict[Hashable, Any] = {}  # None where the key ran once
        self._sharing: list[Any] = []  # those whose memory the next one shares
        self._failures = 0

    def run(self, key: Hashable, body: Callable[[], None], device: torch.device) -> None:
        """Run `body`, or replay what it launched before under this key. Does not synchronise, but for the capture.

        Args:
            key: equal for bodies that launch the same kernels on the same memory.
            body: launches work on the current stream. Must not synchronise, nor leave results anywhere but in memory
                that existed before.
            device: of the work.
        """
        with capturing:
            graph = self._graphs.get(key)
            if graph is None and key in self._graphs and self._failures < MOST_FAILURES:
                graph = self._captured(body, device)
            body() if graph is None else graph.replay()
            self._keep(key, graph)

    def _keep(self, key: Hashable, graph: Any) -> None:
        """Keep as the latest; the one that has not run for longest goes."""
        self._graphs.pop(key, None)
        while len(self._graphs) >= MOST_GRAPHS:
            gone = self._graphs.pop(next(iter(self._graphs)))
            self._sharing = [each for each in self._sharing if each is not gone]
        self._graphs[key] = graph

    def _captured(self, body: Callable[[], None], device: torch.device) -> Any:
        try:
            graph = self._capture(body, device, self._sharing)
        except (RuntimeError, EngineError) as error:
            # A capture only records, so nothing has run. Another thread may have disturbed it: it is tried once more,
            # with memory of its own, because torch does not end a failed capture's use of the shared one.
            self._failures += 1
            self._sharing = []
            reason = str(error).splitlines()[0]
            if self._failures == MOST_FAILURES:
                logger.warning("steps cannot be captured as CUDA graphs and are slower: %s", reason)
            else:
                logger.info("a step was not captured as a CUDA graph and is tried once more: %s", reason)
            return None
        self._sharing.append(graph)
        return graph

    @property
    def num_captured(self) -> int:
        """Graphs that are there to be replayed."""
        return sum(graph is not None for graph in self._graphs.values())

    def clear(self) -> None:
        """Forget every graph: the memory that they work on is about to go."""
        self._graphs.clear()
        self._sharing.clear()
        self._failures = 0
