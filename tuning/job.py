"""The work of `cat-tune` on one bundle: record, fit, measure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.budgets import cat_at, forecast_at, macs_of_full_steps
from cat_pruning.evaluation.candidates import TUNED
from cat_pruning.evaluation.pool import Pool
from cat_pruning.evaluation.solvers import SOLVERS, check_solver
from cat_pruning.evaluation.sweep import costs
from cat_pruning.exporter.macs import ImageMacs
from cat_pruning.models.prompts import Prompt
from cat_pruning.schedule import MadeFor, Schedule, config_sha256
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import never_pruned
from cat_pruning.tuning.fitting import fit
from cat_pruning.tuning.measure import FULL, Contender, Outcome, measure
from cat_pruning.tuning.recorder import RecordedRun, record
from cat_pruning.tuning.recordings import Recordings
from cat_pruning.tuning.tune import most_steps
from cat_pruning.tuning.worker import Tuner

Advance = Callable[[str, int, int], None]  # called with a stage, its total, and how much more of it is done


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A bundle and what its images are like.

    Attributes:
        bundle: whose model is tuned.
        pool: its workers have the pipeline over it.
        directory: of the recordings.
        steps, guidance_scale, height, width: of the pipeline's calls.
        batch: prompts at once. seed: of the first recording.
    """

    bundle: Bundle
    pool: Pool[Tuner]
    directory: Path
    steps: int
    guidance_scale: float
    height: int
    width: int
    batch: int
    seed: int

    @functools.cached_property
    def full_macs(self) -> int:
        """MACs of the full run's image."""
        return macs_of_full_steps(self.macs(1.0), self.steps)

    @functools.cache  # noqa: B019  # a job lives as long as its process
    def macs(self, keep_ratio: float) -> ImageMacs:
        """MACs of an image's parts, counted from the bundle's graphs."""
        settings = PruneSettings(keep_ratio=keep_ratio)
        guided = self.guidance_scale > 1.0
        return costs(self.bundle, self.height, self.width, settings, guided, method="").all

    def speed(self, full_steps: int) -> float:
        """How many times as fast an image is of which so many steps are full and the others are forecasts."""
        macs = self.macs(1.0)
        return self.full_macs / (macs.prompt + self.steps * macs.timestep + full_steps * macs.full)

    def tune(
        self, prompts: Sequence[Prompt], budgets: Sequence[int], advance: Advance
    ) -> tuple[list[Schedule], dict[int, float]]:
        """Record the prompts and fit a schedule for each budget.

        Returns:
            The schedules, and by budget the error on the recordings that they were fitted to.

        Raises:
            SettingsError: the scheduler or the pipeline cannot be tuned, or the recordings are another run's.
            OutputError: the recordings cannot be written.
        """
        run = self._run(prompts)
        stage = f"record {self.steps} steps"
        recorded = record(self.pool, run, self.directory, lambda n: advance(stage, len(prompts), n))
        recordings = recorded.recordings
        total = most_steps(budgets, recordings.count, self.batch)
        found = fit(self.pool, recorded, run.configs(), budgets, self.batch, lambda n: advance("fit", total, n))
        advance("fit", total, total)  # the bar goes no further: choices that begin alike shared steps
        schedules = [
            Schedule.of(
                self.steps,
                each.full_steps,
                each.weights[-1],
                each.weights[0] if recordings.num_parts > 1 else None,
                timesteps=recorded.timesteps,
                made_for=self._made_for(recordings),
            )
            for each in found.values()
        ]
        return schedules, {budget: float(each.errors.mean()) for budget, each in found.items()}

    def measure(
        self, prompts: Sequence[Prompt], schedules: Sequence[Schedule], advance: Advance, *, peers: bool
    ) -> list[Outcome]:
        """Hold the schedules against the full run, and with `peers` other ways at the same cost; the full run first."""
        contenders = [self._full(), *(each for schedule in schedules for each in self._at_cost_of(schedule, peers))]
        total = len(prompts) * len(contenders)
        run = self._run(prompts)
        configs = [
            dataclasses.replace(config, seed=first)
            for first, config in zip(range(0, len(prompts), self.batch), run.configs(), strict=True)
        ]
        return measure(self.pool, contenders, prompts, configs, lambda n: advance("measure images", total, n))

    def machine(self) -> dict[str, str]:
        """Processor, libraries and engine."""
        return self.pool.about.machine | {"engine": self.pool.about.engine}

    def _run(self, prompts: Sequence[Prompt]) -> RecordedRun:
        scheduler = self.pool.about.scheduler
        return RecordedRun(
            bundle=self.bundle.manifest.digest,
            engine=self.pool.about.engine,
            scheduler={"class": type(scheduler).__name__, **scheduler.config},
            steps=self.steps,
            prompts=tuple(prompt.text for prompt in prompts),
            batch=self.batch,
            seed=self.seed,
            height=self.height,
            width=self.width,
            guidance_scale=self.guidance_scale,
        )

    def _made_for(self, recordings: Recordings) -> MadeFor:
        manifest = self.bundle.manifest
        return MadeFor(
            transformer_class=manifest.transformer_class,
            config_sha256=config_sha256(manifest.transformer_config),
            scheduler=type(self.pool.about.scheduler).__name__,
            guidance_scale=self.guidance_scale,
            height=self.height,
            width=self.width,
            prompts=recordings.count,
        )

    def _full(self) -> Contender:
        settings = never_pruned(PruneSettings(), self.steps)
        return Contender(method=FULL, budget=self.steps, steps=self.steps, settings=settings, macs=self.full_macs)

    def _at_cost_of(self, schedule: Schedule, peers: bool) -> list[Contender]:
        macs, steps, budget = self.macs(1.0), self.steps, len(schedule.full_steps)

        def pruned(method: str, settings: PruneSettings) -> Contender:
            of_kind = self.macs(settings.keep_ratio) if settings.prunes else macs
            cost = of_kind.pruned_image(steps, settings)
            return Contender(method=method, budget=budget, steps=steps, settings=settings, macs=cost)

        def fewer(method: str, solver: str | None = None) -> Contender:
            settings = never_pruned(PruneSettings(), budget)
            cost = macs_of_full_steps(macs, budget)
            return Contender(method=method, budget=budget, steps=budget, settings=settings, macs=cost, solver=solver)

        tuned = pruned(TUNED, PruneSettings.tuned(schedule))
        if not peers:
            return [tuned]
        return [
            tuned,
            pruned("forecast", forecast_at(budget, steps, macs)),
            fewer("fewer steps"),
            *(fewer(name, solver=name) for name in SOLVERS if _is_possible(name, self.pool.about.scheduler)),
            pruned("cat", cat_at(budget, steps, PruneSettings(), self.macs)),
        ]


def _is_possible(solver: str, scheduler: Any) -> bool:
    try:
        check_solver(solver, scheduler)
    except SettingsError:
        return False
    return True
