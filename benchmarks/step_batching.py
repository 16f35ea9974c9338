"""Would images at different steps, computed in one call, pay? A simulation over measured costs.

What is measured, on this processor: CPU seconds of a full step of 1, 2, 4 and 8 images in one call, by the engine that
serves. What is simulated, with those costs: one server under Poisson arrivals of images of equal length, in virtual
time. Three ways of batching are compared: one image at a time; whole images together, as cat-serve does it (a batch
takes what waits when it begins); and step by step, where an image joins at the next step and leaves after its last.
That one stands for a call with a timestep per row, which the engines do not have: its cost is taken to be that of a
call of as many images at one timestep.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads sleep between steps

import argparse
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from machine import write_result

BATCHES: Final = (1, 2, 4, 8)
LOADS: Final = (0.5, 0.8, 0.95, 1.2)  # of what one image at a time can take
WAYS: Final = {"one at a time": (1, False), "whole images": (4, False), "step by step": (4, True)}


def main() -> int:
    """Measure, simulate, and write benchmarks/results/step-batching.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle of sd3-mini")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4000, help="of a simulation")
    parser.add_argument("--steps", type=int, default=28)
    arguments = parser.parse_args()
    costs = measured(arguments.bundle, arguments.rounds)
    image = costs[1] * arguments.steps
    table: dict[str, Any] = {}
    for load in LOADS:
        comes = arrivals(load / image, arguments.images, seed=0)
        table[f"{load:g}"] = {
            name: summary(simulate(comes, arguments.steps, costs, most, by_step=by_step), comes, image)
            for name, (most, by_step) in WAYS.items()
        }
    result = {
        "step_ms_by_images": {str(count): round(cost * 1e3, 2) for count, cost in costs.items()},
        "steps": arguments.steps,
        "latency_in_images_by_load": table,
    }
    sys.stdout.write(f"{result}\n{write_result('step-batching', result)}\n")
    return 0


def measured(bundle: Path, rounds: int) -> dict[int, float]:
    """CPU seconds of a full step, by the images of a call: medians over the steps of interleaved runs."""
    from serving_load import PROMPTS, Direct

    from cat_pruning.settings import PruneSettings

    direct, settings = Direct(bundle), PruneSettings(full_steps=100)
    seconds: dict[int, list[float]] = {count: [] for count in BATCHES}
    stamps: list[float] = []
    hooks = (
        direct.pipe.transformer.register_forward_pre_hook(lambda *_: stamps.append(time.process_time())),
        direct.pipe.transformer.register_forward_hook(lambda *_: stamps.append(time.process_time())),
    )
    for _ in range(rounds):
        for count in BATCHES:
            stamps.clear()
            direct([PROMPTS[0]] * count, list(range(count)), settings, (128, 128), 6)
            seconds[count] += [after - before for before, after in zip(stamps[2::2], stamps[3::2], strict=True)]
    for hook in hooks:
        hook.remove()
    return {count: statistics.median(took) for count, took in seconds.items()}


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """When images come: a Poisson process of `rate` per second."""
    chance, now, comes = random.Random(seed), 0.0, []
    for _ in range(count):
        now += chance.expovariate(rate)
        comes.append(now)
    return comes


def simulate(
    comes: Sequence[float], steps: int, costs: Mapping[int, float], most: int, *, by_step: bool
) -> list[float]:
    """When each image is done, in virtual seconds.

    Args:
        comes: when each comes, ascending.
        steps: of each image.
        costs: seconds of a step by the images of a call; between those that were measured, on the line through them.
        most: images of a call.
        by_step: whether images join and leave a call at any step; else a batch stays as it began.
    """
    done = [0.0] * len(comes)
    waiting: deque[int] = deque()
    running: dict[int, int] = {}  # steps that are left
    now, following = 0.0, 0
    while following < len(comes) or waiting or running:
        if not running and not waiting:
            now = max(now, comes[following])
        while following < len(comes) and comes[following] <= now:
            waiting.append(following)
            following += 1
        while waiting and len(running) < most and (by_step or not any(left < steps for left in running.values())):
            running[waiting.popleft()] = steps
        now += cost_of(len(running), costs)
        for image in list(running):
            running[image] -= 1
            if not running[image]:
                done[image] = now
                del running[image]
    return done


def cost_of(count: int, costs: Mapping[int, float]) -> float:
    """Seconds of a step of `count` images."""
    if count in costs:
        return costs[count]
    below, above = max(each for each in costs if each < count), min(each for each in costs if each > count)
    return costs[below] + (costs[above] - costs[below]) * (count - below) / (above - below)


def summary(done: Sequence[float], comes: Sequence[float], image: float) -> dict[str, float]:
    """Latencies in units of one image alone, and images per such unit."""
    took = sorted((after - before) / image for before, after in zip(comes, done, strict=True))
    return {
        "mean": round(statistics.fmean(took), 2),
        "p95": round(took[int(0.95 * len(took))], 2),
        "throughput": round(len(done) * image / (max(done) - comes[0]), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
