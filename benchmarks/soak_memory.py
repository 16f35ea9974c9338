"""Whether memory stays flat over many images of many shapes; `make soak`.

One process makes images of different sizes and numbers of prompts, in random order, and notes its resident memory after
each. It passes where the mean of the last quarter is within 3 % of the second quarter's: in the first one all shapes
are new. `--plain` does the same with diffusers' own pipeline.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads sleep between steps

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any, Final

from machine import write_result
from source_tree import ROOT

from cat_pruning.checkpoints.library_logs import quiet_diffusers
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.settings import PruneSettings

MOST_GROWTH: Final = 0.03
SIDES: Final = range(64, 144, 16)  # pixels
PROMPTS: Final = ("a blue star", "a large red circle above a small green square")


def main() -> int:
    """Measure, draw, write benchmarks/results/NAME.json and docs/NAME.png; 1 where memory grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle of sd3-mini")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--plain", action="store_true", help="the untouched pipeline")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--shapes", type=int, default=40)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--name", default="soak-memory", help="of the files that are written")
    arguments = parser.parse_args()
    pipe = plain_pipeline(arguments.bundle) if arguments.plain else pruned_pipeline(arguments.bundle, arguments.engine)
    pipe.set_progress_bar_config(disable=True)
    started = time.process_time()
    curve = soak(pipe, shapes(arguments.shapes), arguments.images, arguments.steps)
    seconds = (time.process_time() - started) / arguments.images
    quarters = quarter_means(curve)
    growth = quarters[3] / quarters[1] - 1
    result = {
        "engine": "plain" if arguments.plain else arguments.engine,
        "images": arguments.images,
        "shapes": arguments.shapes,
        "steps": arguments.steps,
        "cpu_seconds_per_image": round(seconds, 3),
        "quarter_means_mib": [round(mean) for mean in quarters],
        "most_mib": round(max(curve)),
        "growth": round(growth, 4),
        "resident_mib": [round(value) for value in curve[:: max(1, len(curve) // 200)]],
    }
    print(write_result(arguments.name, result))  # noqa: T201
    print(draw(curve, ROOT / "docs" / f"{arguments.name}.png", result["engine"]))  # noqa: T201
    print(f"quarters {result['quarter_means_mib']} MiB: {growth:+.1%}, at most {MOST_GROWTH:.0%}")  # noqa: T201
    return int(growth > MOST_GROWTH)


def pruned_pipeline(bundle: Path, engine: str) -> Any:
    """The bundle's pipeline; of three steps one is pruned."""
    return load_pipeline(bundle, engine, settings=PruneSettings(full_steps=2, num_clusters=8))


def plain_pipeline(bundle: Path) -> Any:
    """The untouched pipeline of the bundle's model."""
    from diffusers import StableDiffusion3Pipeline

    from cat_pruning.models import miniatures

    with quiet_diffusers():
        return StableDiffusion3Pipeline.from_pretrained(
            miniatures()[bundle.name], text_encoder_3=None, tokenizer_3=None
        )


def shapes(count: int) -> list[tuple[int, int, int]]:
    """Height, width and prompts of every shape, the same on every run."""
    every = [(height, width, prompts) for height in SIDES for width in SIDES for prompts in (1, 2)]
    return random.Random(0).sample(every, count)


def soak(pipe: Any, every: list[tuple[int, int, int]], images: int, steps: int) -> list[float]:
    """Resident memory after each image, MiB."""
    import torch

    order, curve = random.Random(1), []
    for seed in range(images):
        height, width, prompts = order.choice(every)
        pipe(
            list(PROMPTS[:prompts]),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=3.0,
            max_sequence_length=24,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        )
        curve.append(resident_mib())
    return curve


def resident_mib() -> float:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def quarter_means(curve: list[float]) -> list[float]:
    """Of the four quarters."""
    quarter = len(curve) // 4
    return [sum(curve[k * quarter : (k + 1) * quarter]) / quarter for k in range(4)]


def draw(curve: list[float], path: Path, label: str) -> Path:
    """The curve as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve, linewidth=1, label=label)
    axes.set(xlabel="images", ylabel="resident MiB", ylim=(0, 1.1 * max(curve)))
    for quarter in range(1, 4):
        axes.axvline(quarter * len(curve) / 4, color="0.8", linewidth=0.8, zorder=0)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    sys.exit(main())
