"""Trials of the settings that the paper leaves open: what each does to the miniature's pictures; `make try-settings`.

    python benchmarks/try_settings.py build/eval/sd3-mini --prompts 16

Every trial computes the same images as the full run, the paper's settings among them, at the same number of MACs but
where its name says otherwise. Printed and written to results/settings.json: the mean relative error of the final
latents, and the change of the coverage against the full run, with the half-width of its 95 % interval over prompts.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads sleep between steps

from machine import write_result

from cat_pruning.evaluation.intervals import Interval, mean_interval
from cat_pruning.evaluation.metrics import Metric, Metrics, Sample
from cat_pruning.evaluation.worker import last_latents
from cat_pruning.models.prompts import Prompt, load_prompts
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.schedule import Schedule
from cat_pruning.settings import Policy, Pooling, PruneSettings, Reuse
from cat_pruning.tools.generate import GenerateConfig, generate, never_pruned

STEPS, BATCH, GUIDANCE, TEXT_TOKENS = 28, 8, 3.0, 24
FEWER = "16 full steps"  # as many MACs as the paper's settings, to 0.1 %
REFRESHED, FORECAST = PruneSettings.preset("refreshed"), PruneSettings.preset("forecast")


def forecast_between(full: tuple[int, ...], order: int = 1) -> PruneSettings:
    """Forecasts by the polynomial through the last `order` + 1 full steps, at sd3-mini's timesteps, which are even."""
    weights = {}
    for step in sorted(set(range(STEPS)) - set(full)):
        last = [before for before in full if before < step][-order - 1 :]
        weights[step] = {
            this: math.prod((step - other) / (this - other) for other in last if other != this) for this in last
        }
    return PruneSettings.tuned(Schedule.of(STEPS, full, weights))


TRIALS: dict[str, PruneSettings] = {
    "the paper's": PruneSettings(),
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
    "16 full, nothing between": FORECAST.replace(reuse=Reuse.REPEAT),
    "the forecast: the same, extrapolated": FORECAST,
    "the same, full 0-3, 5, 7, ...": forecast_between((*range(4), *range(5, STEPS, 2))),
    "the same, full 0-2, 4, 6, ... 27": forecast_between((*range(3), *range(4, STEPS, 2), STEPS - 1)),
    "8 full, then as many spread": forecast_between((*range(8), 10, 12, 14, 16, 18, 20, 23, 26)),
}


@dataclass(frozen=True, slots=True)
class Batch:
    """Some scenes, with what the full run makes of them."""

    start: int
    prompts: list[Prompt]
    full: Sample
    scores: list[dict[str, float | None]]


class Trials:
    """The same images under one trial after another, against the full run's.

    Args:
        prompts: number of scenes.
    """

    def __init__(self, prompts: int) -> None:
        self.prompts = load_prompts(f"scenes:{prompts}")
        self._metrics = Metrics([Metric.LATENTS, Metric.COVERAGE], self.prompts)
        self._full: dict[int, float] = {}  # coverage by prompt
        self._errors: dict[str, list[float]] = {}
        self._changes: dict[str, list[float]] = {}

    def batches(self, pipe: Any) -> Iterator[Batch]:
        """The scenes, a few at a time."""
        pipe.set_progress_bar_config(disable=True)
        for start in range(0, len(self.prompts), BATCH):
            prompts = self.prompts[start : start + BATCH]
            full = _sample(pipe, never_pruned(PruneSettings(), STEPS), prompts, start, STEPS)
            scores = self._metrics.score(full, None, prompts)
            self._full |= {start + index: score["coverage"] or 0.0 for index, score in enumerate(scores)}
            yield Batch(start, prompts, full, scores)

    def run(self, pipe: Any, name: str, settings: PruneSettings, batch: Batch, steps: int = STEPS) -> None:
        """Make a batch's images under `settings`."""
        sample = _sample(pipe, settings, batch.prompts, batch.start, steps)
        scores = self._metrics.score(sample, batch.full, batch.prompts)
        self._errors.setdefault(name, []).extend(score["latents_error"] or 0.0 for score in scores)
        self._changes.setdefault(name, []).extend(
            (score["coverage"] or 0.0) - (full["coverage"] or 0.0)
            for score, full in zip(scores, batch.scores, strict=True)
        )

    def summary(self) -> dict[str, Any]:
        """The numbers of every trial, which are printed as well."""
        rows = {}
        for name, changes in self._changes.items():
            error, change = _interval(self._errors[name]), _interval(changes)
            rows[name] = {"latents_error": error.mean, "change": change.mean, "half_width": change.half_width}
            print(f"{name:36s} latents {error.mean:.4f}  coverage {change.mean:+.4f} ± {change.half_width:.4f}")  # noqa: T201
        return {"prompts": len(self.prompts), "full": fmean(self._full.values()), "trials": rows}


def main() -> None:
    """Run every trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=16, help="scenes (default: 16)")
    arguments = parser.parse_args()
    trials = Trials(arguments.prompts)
    pipe = load_pipeline(arguments.bundle, "onnxruntime")
    for batch in trials.batches(pipe):
        trials.run(pipe, FEWER, never_pruned(PruneSettings(), STEPS), batch, steps=16)
        for name, settings in TRIALS.items():
            trials.run(pipe, name, settings, batch)
    print(f"written to {write_result('settings', trials.summary())}")  # noqa: T201


def _sample(pipe: Any, settings: PruneSettings, prompts: list[Prompt], start: int, steps: int) -> Sample:
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


def _interval(values: list[float]) -> Interval:
    interval = mean_interval(values, list(range(len(values))))
    assert interval is not None
    return interval


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
