"""The token operators' CUDA kernels against a device copy of the same bytes and against torch's own; needs a GPU.

At SD3-medium's sizes: caches of 4096 image tokens and 333 text rows, of which a pruned step computes 1228 and all text
rows. Every contestant goes over as many caches as a step has, each of them once, so that none is found in the GPU's
second-level cache; the launches are captured into a CUDA graph, so that Python's time is not in it. All contestants run
in turn within every round, timed with CUDA events, and medians are over the rounds. Bytes are those of the moved rows,
read once and written once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from machine import write_result
from rich.console import Console
from rich.table import Table
from timing import interleaved
from torch import Tensor

from cat_pruning.plugins.cuda_launch import Launch

BATCH, WIDTH = 2, 1536
IMAGE_TOKENS, KEPT_TOKENS, TEXT_ROWS = 4096, 1228, 333
NUM_ROWS, NUM_KEPT = IMAGE_TOKENS + TEXT_ROWS, KEPT_TOKENS + TEXT_ROWS
NUM_CACHES = 48  # K and V of 24 layers
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Buffers:
    """One cache and the rows that go into it and come out of it."""

    tokens: Tensor  # (B, N, D)
    rows: Tensor  # (B, n, D)
    gathered: Tensor  # (B, n, D)


def main() -> int:
    """Measure, print, and write benchmarks/results/token-kernels.json. 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--name", default="token-kernels", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("bench_token_kernels needs an NVIDIA GPU, and torch has no CUDA device here\n")
        return 2
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    console = Console()
    results = {}
    for name in DTYPES:
        results[name] = measure(name, device, arguments.rounds)
        print_table(console, f"{properties.name}, {name}", results[name])
    path = write_result(
        arguments.name,
        {
            "gpu": {"name": properties.name, "l2_bytes": properties.L2_cache_size, "cuda": torch.version.cuda},
            "sizes": {"batch": BATCH, "rows": NUM_ROWS, "kept": NUM_KEPT, "width": WIDTH, "caches": NUM_CACHES},
            "rounds": arguments.rounds,
            "results": results,
        },
    )
    console.print(f"wrote {path}")
    return 0


def measure(name: str, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """All contestants on caches of one of `DTYPES`; see `summarize`."""
    dtype = DTYPES[name]
    graphs = {name: captured(run).replay for name, run in contestants(*make_buffers(device, dtype)).items()}
    return summarize(interleaved(graphs, rounds, device, warm_rounds=0), moved_bytes(dtype))


def make_buffers(
    device: torch.device, dtype: torch.dtype, num_caches: int = NUM_CACHES
) -> tuple[list[Buffers], Tensor]:
    """The caches of a step, and the kept rows' indices (B, n) int32, ascending as a selection's are."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(BATCH, IMAGE_TOKENS, generator=generator).argsort(1)[:, :KEPT_TOKENS].sort(1).values
    text = torch.arange(IMAGE_TOKENS, NUM_ROWS).expand(BATCH, -1)
    indices = torch.cat([image, text], dim=1).to(device, torch.int32)
    buffers = [
        Buffers(
            torch.randn(BATCH, NUM_ROWS, WIDTH, dtype=dtype, device=device),
            torch.randn(BATCH, NUM_KEPT, WIDTH, dtype=dtype, device=device),
            torch.empty(BATCH, NUM_KEPT, WIDTH, dtype=dtype, device=device),
        )
        for _ in range(num_caches)
    ]
    return buffers, indices


def contestants(buffers: list[Buffers], indices: Tensor) -> dict[str, Callable[[], None]]:
    """Each goes over all caches once."""
    device = indices.device
    wide = indices.long().unsqueeze(-1).expand(-1, -1, WIDTH)
    gathers = [Launch.gather(each.tokens, indices, each.gathered) for each in buffers]
    scatters = [Launch.scatter(each.tokens, indices, each.rows) for each in buffers]

    def over_all(move: Callable[[Any], object], caches: list[Any]) -> Callable[[], None]:
        def run() -> None:
            for each in caches:
                move(each)

        return run

    return {
        "copy": over_all(lambda each: each.gathered.copy_(each.rows), buffers),
        "gather": over_all(lambda launch: launch.run(device), gathers),
        "torch gather": over_all(lambda each: torch.gather(each.tokens, 1, wide, out=each.gathered), buffers),
        "scatter": over_all(lambda launch: launch.run(device), scatters),
        "torch scatter": over_all(lambda each: each.tokens.scatter_(1, wide, each.rows), buffers),
    }


def captured(run: Callable[[], None]) -> Any:
    """A CUDA graph of `run`, replayed once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # loads the kernels, which no capture may do
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def moved_bytes(dtype: torch.dtype) -> int:
    """Of one launch: every moved row is read and written."""
    return 2 * BATCH * NUM_KEPT * WIDTH * dtype.itemsize


def summarize(times: dict[str, list[float]], launch_bytes: int) -> dict[str, dict[str, float]]:
    """Per contestant: microseconds a launch, GB/s, and its speed relative to the copy's within the same rounds."""
    summary = {}
    for name, rounds in times.items():
        microseconds = statistics.median(rounds) * 1e3 / NUM_CACHES
        ratios = [copy / own for copy, own in zip(times["copy"], rounds, strict=True)]
        summary[name] = {
            "us_per_launch": round(microseconds, 2),
            "gb_per_s": round(launch_bytes / microseconds / 1e3, 1),
            "of_copy": round(statistics.median(ratios), 3),
        }
    return summary


def print_table(console: Console, title: str, summary: dict[str, dict[str, float]]) -> None:
    """One row per contestant."""
    table = Table("", "µs per launch", "GB/s", "of the copy's", title=title)
    for name, values in summary.items():
        table.add_row(
            name, f"{values['us_per_launch']:.2f}", f"{values['gb_per_s']:.0f}", f"{100 * values['of_copy']:.0f} %"
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
