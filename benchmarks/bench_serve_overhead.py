"""What cat-serve costs beside its pipeline: throughput at saturation, the latency of an idle server, and rounding.

Pipeline and server take turns within one process, on the same machine under the same load, so only their ratio counts.
Times are given by the clock and in CPU time of the process, which others on the machine disturb less; the server's
includes what the client takes.
At saturation twice as many requests as fit a batch are always in flight. With `--idle`, an idle server is asked for one
image of one step at a time, so that what it adds is not lost in what is computed, and each answer is compared with a
call of the pipeline right before it. `--rounding` compares images of batches
with the same images made one at a time, by the pipeline alone.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads sleep between steps

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_result
from serving_load import PROMPTS, URL, Direct, Running, running

from cat_pruning.settings import PruneSettings

SIZE = (128, 128)


def main() -> int:
    """Measure, and write benchmarks/results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle of sd3-mini")
    parser.add_argument("--batch", default="1,4", help="batches to saturate with (default: 1,4)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--images", type=int, default=8, help="of a turn at saturation")
    parser.add_argument("--pairs", type=int, default=40, help="of an image asked for and a call, with --idle")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--idle", action="store_true", help="measure that alone, into NAME-idle.json")
    parser.add_argument("--rounding", action="store_true", help="measure that alone, into NAME-rounding.json")
    parser.add_argument("--name", default="serve-overhead", help="of the file that is written")
    arguments = parser.parse_args()
    direct = Direct(arguments.bundle)
    if arguments.rounding:
        found = rounding(direct, arguments.steps)
        sys.stdout.write(f"{found}\n{write_result(f'{arguments.name}-rounding', found)}\n")
        return 0
    if arguments.idle:
        with running(arguments.bundle, max_batch=1) as server:
            found = idle(direct, server, arguments.pairs)
        sys.stdout.write(f"{found}\n{write_result(f'{arguments.name}-idle', found)}\n")
        return 0
    result: dict[str, Any] = {"steps": arguments.steps, "size": "128x128", "preset": "forecast", "saturation": {}}
    for batch in map(int, arguments.batch.split(",")):
        with running(arguments.bundle, max_batch=batch) as server:
            rates = saturation(direct, server, batch, arguments.rounds, arguments.images, arguments.steps)
            result["saturation"][str(batch)] = rates
    sys.stdout.write(f"{result}\n{write_result(arguments.name, result)}\n")
    return 0


def saturation(direct: Direct, server: Running, batch: int, rounds: int, num_images: int, steps: int) -> dict[str, Any]:
    """Images per second of both, by turns, and the median of the ratios."""
    settings = PruneSettings.preset("forecast")
    seconds: dict[str, list[tuple[float, float]]] = {"pipeline": [], "server": []}  # by the clock, and of CPU
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(num_images)]

    def plain() -> None:
        for first in range(0, num_images, batch):
            some = prompts[first : first + batch]
            direct(some, list(range(first, first + len(some))), settings, SIZE, steps)

    def served() -> None:
        with server.client() as client, ThreadPoolExecutor(2 * batch) as pool:
            for status in pool.map(lambda each: ask(client, each[1], each[0], steps), enumerate(prompts)):
                assert status == 200, status

    for turn in range(-1, rounds):  # the first one is not counted
        for name, run in (("pipeline", plain), ("server", served)):
            began = now()
            run()
            if turn >= 0:
                seconds[name].append(since(began))
    pairs = list(zip(seconds["pipeline"], seconds["server"], strict=True))
    ratios, cpu = ([before[kind] / after[kind] for before, after in pairs] for kind in (0, 1))
    batches = server.service.metrics.registry.get_sample_value("cat_batch_images_count") or 0.0
    images = server.service.metrics.registry.get_sample_value("cat_batch_images_sum") or 0.0
    return {
        "images_per_second": {
            name: round(num_images / statistics.median(clock for clock, _ in took), 3) for name, took in seconds.items()
        },
        "throughput_ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "cpu_ratio": round(statistics.median(cpu), 3),
        "cpu_ratios": [round(ratio, 3) for ratio in cpu],
        "images_per_batch": round(images / batches, 2),
    }


def idle(direct: Direct, server: Running, pairs: int) -> dict[str, Any]:
    """What an idle server adds to a call of the pipeline, in ms: medians."""
    settings, calls, answers, beside = PruneSettings.preset("forecast"), [], [], []
    with server.client() as client:
        for pair in range(-2, pairs):
            began = now()
            direct([PROMPTS[0]], [pair + 2], settings, SIZE, 1)
            call, began = since(began), now()
            timings = client.post(URL, json=body(PROMPTS[0], pair + 2, 1)).json()["timings"]
            answer = since(began)
            if pair >= 0:
                inside = sum(timings[stage] for stage in ("encode_ms", "steps_ms", "decode_ms"))
                calls.append(call)
                answers.append(answer)
                beside.append(answer[0] * 1e3 - inside)
    added = [
        [(after[kind] - before[kind]) * 1e3 for before, after in zip(calls, answers, strict=True)] for kind in (0, 1)
    ]
    return {
        "pairs": pairs,
        "pipeline_ms": round(statistics.median(clock for clock, _ in calls) * 1e3, 1),
        "answer_ms": round(statistics.median(clock for clock, _ in answers) * 1e3, 1),
        "added_ms": round(statistics.median(added[0]), 1),
        "added_cpu_ms": round(statistics.median(added[1]), 1),
        "beside_the_call_ms": round(statistics.median(beside), 1),
        "beside_the_call_least_ms": round(min(beside), 1),
    }


def now() -> tuple[float, float]:
    """Seconds by the clock, and of CPU time of the process."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    """What has passed of both."""
    clock, cpu = now()
    return clock - began[0], cpu - began[1]


def rounding(direct: Direct, steps: int) -> dict[str, Any]:
    """By how many grey values of 255 images of batches of 2 and 4 differ at most from those made alone."""
    every = {"full": PruneSettings(full_steps=2 * steps), "paper": PruneSettings()}
    every["forecast"] = PruneSettings.preset("forecast")
    found: dict[str, Any] = {"steps": steps, "size": "128x128", "grey_values": {}}
    for name, settings in every.items():
        prompts = [PROMPTS[number % len(PROMPTS)] for number in range(4)]
        alone = [direct([prompts[seed]], [seed], settings, SIZE, steps)[0] for seed in range(4)]
        for count in (2, 4):
            together = direct(prompts[:count], list(range(count)), settings, SIZE, steps)
            pairs = [(np.asarray(a).astype(int), np.asarray(b)) for a, b in zip(together, alone, strict=False)]
            found["grey_values"][f"{name}, {count}"] = [int(np.abs(a - b).max()) for a, b in pairs]
    return found


def ask(client: Any, prompt: str, seed: int, steps: int) -> int:
    """The status of one request."""
    return int(client.post(URL, json=body(prompt, seed, steps)).status_code)


def body(prompt: str, seed: int, steps: int) -> dict[str, Any]:
    """Of one request."""
    size = f"{SIZE[1]}x{SIZE[0]}"
    fields = {"prompt": prompt, "seed": seed, "size": size, "num_inference_steps": steps, "guidance_scale": 3.0}
    return fields | {"preset": "forecast"}


if __name__ == "__main__":
    sys.exit(main())
