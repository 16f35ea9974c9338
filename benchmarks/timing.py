"""Times of contestants that run in turn: CUDA events, rounds, medians."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], object]
REPEATS = 4  # steps between two events: the host runs ahead, as it does in a loop


def interleaved(
    runs: dict[str, Run], rounds: int, device: torch.device, repeats: int = 1, warm_rounds: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of every contestant in every round, one after the other; `warm_rounds` before are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(-warm_rounds, rounds):
        for name, run in runs.items():
            elapsed = timed(run, device, repeats)
            if index >= 0:
                times[name].append(elapsed)
    return times


def timed(run: Run, device: torch.device, repeats: int = 1) -> float:
    """Milliseconds of one of `repeats` runs, by CUDA events where there is a GPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - started) * 1e3 / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed / repeats


def seconds_of(run: Run, device: torch.device) -> float:
    """Wall time of one run, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Over the rounds."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def graph_of(run: Run, device: torch.device) -> Run:
    """`run`, which has run before, as a captured graph, on a GPU; the memory that it works on lives as long."""
    if device.type != "cuda":
        return run
    from cat_pruning.engines import cuda_graphs

    return functools.partial(_replay, cuda_graphs.capture(lambda: _ignore(run()), device, []), run)


def _replay(graph: Any, run: Run) -> None:
    """Replay. `run` is kept by who keeps this, because the graph does not keep the tensors that it reads."""
    graph.replay()


def _ignore(result: object) -> None:
    pass
