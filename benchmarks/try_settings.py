"""Trials of the settings that the paper leaves open: what each does to the miniature's pictures; `make try-settings`.

    python benchmarks/try_settings.py build/eval/sd3-mini --prompts 16

Every trial computes the same images as the full run, the paper's settings among them, at the same number of MACs but
where its name says otherwise. Printed and written to results/settings.json: the mean relative error of the final
latents, and the change of the scene score against the full run, with the half-width of its 95 % interval over prompts.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads sleep between steps

from machine import write_result

from cat_pruning.evaluation.evaluate import last_latents
from cat_pruning.evaluation.metrics import Metric, Metrics, Sample
from cat_pruning.evaluation.prompts import Prompt, load_prompts
from cat_pruning.evaluation.statistics import Interval, mean_interval
from cat_pruning.runtime.generate import GenerateConfig, generate, never_pruned
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.settings import Policy, Pooling, PruneSettings, Reuse

STEPS, BATCH, GUIDANCE, TEXT_TOKENS = 28, 8, 3.0, 24
FEWER = "16 full steps"  # as many MACs as the paper's settings, to 0.1 %
ODD = (5, 7, 9, 11, 13, 15, 18, 20, 23, 26)
REFRESHED = PruneSettings().refreshed()
TRIALS: dict[str, PruneSettings] = {
    "the paper's": PruneSettings(),
    "extrapolated": PruneSettings(reuse=Reuse.EXTRAPOLATE),
    "fresh fraction 0.1": PruneSettings(fresh_fraction=0.1),
    "fresh fraction 0.5": PruneSettings(fresh_fraction=0.5),
    "staleness decay 0.9": PruneSettings(staleness_decay=0.9),
    "mean pooling": PruneSettings(pooling=Pooling.MEAN),
    "noise scale 0.2": PruneSettings(noise_scale=0.2),
    "10 clusters": PruneSettings(num_clusters=10),
    "quotas doubled": PruneSettings(first_quota=0.2, fresh_quotas=(0.3, 0.2, 0.1)),
    "4 full, every 6th": PruneSettings(full_steps=4, refresh_every=6),
    "4 full, every 4th, keep 0.2": PruneSettings(full_steps=4, refresh_every=4, keep_ratio=0.2),
    "4 full, every 3rd, keep 0.1": REFRESHED.replace(reuse=Reuse.REPEAT),
    "the same, extrapolated": REFRESHED,
    "the same, random tokens": REFRESHED.replace(policy=Policy.RANDOM),
    "14 full, one token": PruneSettings(full_steps=4, extra_full_steps=ODD, keep_ratio=1e-6),
    "the same extrapolated": PruneSettings(
        full_steps=4, extra_full_steps=ODD, keep_ratio=1e-6, reuse=Reuse.EXTRAPOLATE
    ),
}


def main() -> None:
    """Run every trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=16, help="scenes (default: 16)")
    arguments = parser.parse_args()
    prompts = load_prompts(f"scenes:{arguments.prompts}")
    metrics = Metrics([Metric.PSNR, Metric.LATENTS, Metric.SCENE], prompts)
    pipe = load_pipeline(arguments.bundle, "onnxruntime")
    pipe.set_progress_bar_config(disable=True)
    scores: dict[str, list[dict[str, float | None]]] = {name: [] for name in ("full", FEWER, *TRIALS)}
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        full = _sample(pipe, never_pruned(PruneSettings(), STEPS), batch, start)
        scores["full"] += metrics.score(full, None, batch)
        fewer = _sample(pipe, never_pruned(PruneSettings(), STEPS), batch, start, steps=16)
        scores[FEWER] += metrics.score(fewer, full, batch)
        for name, settings in TRIALS.items():
            scores[name] += metrics.score(_sample(pipe, settings, batch, start), full, batch)
    result = {name: _summary(scores[name], scores["full"]) for name in (FEWER, *TRIALS)}
    for name, row in result.items():
        print(f"{name:30s} latents {row['latents_error']:.4f}  scene {row['change']:+.4f} ± {row['half_width']:.4f}")  # noqa: T201
    full_score = mean_interval([row["scene_score"] for row in scores["full"]], list(range(len(prompts))))
    assert full_score is not None
    file = write_result("settings", {"prompts": len(prompts), "full": full_score.mean, "trials": result})
    print(f"written to {file}")  # noqa: T201


def _sample(pipe: Any, settings: PruneSettings, prompts: list[Prompt], start: int, steps: int = STEPS) -> Sample:
    config = GenerateConfig(
        prompts=tuple(prompt.text for prompt in prompts),
        height=128,
        width=128,
        steps=steps,
        guidance_scale=GUIDANCE,
        seed=start,
        text_arguments={"max_sequence_length": TEXT_TOKENS},
    )
    with last_latents(pipe) as latents:
        run = generate(pipe, settings, config)
    return Sample(images=run.images, latents=latents[-1].float())


def _summary(rows: list[dict[str, float | None]], full: list[dict[str, float | None]]) -> dict[str, float]:
    numbers = list(range(len(rows)))
    errors = _interval([row["latents_error"] for row in rows], numbers)
    change = _interval(
        [(row["scene_score"] or 0.0) - (base["scene_score"] or 0.0) for row, base in zip(rows, full, strict=True)],
        numbers,
    )
    return {"latents_error": errors.mean, "change": change.mean, "half_width": change.half_width}


def _interval(values: list[float | None], prompts: list[int]) -> Interval:
    interval = mean_interval(values, prompts)
    assert interval is not None
    return interval


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
