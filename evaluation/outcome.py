"""The results of a directory by candidate, as tables, curves and sentences need them."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.candidates import FEWER_STEPS, FULL, Candidate, tuned_full_steps
from cat_pruning.evaluation.measures import measure_of
from cat_pruning.evaluation.methods import AT_EDM, FORECAST, MAIN_METHOD, policy_of
from cat_pruning.evaluation.results import ImageResult, load_results, load_spec


class Outcome:
    """The results of a directory, by candidate.

    Args:
        directory: that a `ResultStore` wrote.

    Raises:
        SettingsError: no evaluation, or no results yet.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.spec = directory, load_spec(directory)
        found = load_results(directory, self.spec)
        if not found:
            raise SettingsError(f"{directory} has no results yet", "start the same cat-eval again, it goes on there")
        grouped: dict[str, dict[tuple[int, int], ImageResult]] = {}
        for result in found:
            grouped.setdefault(result.candidate, {})[result.prompt, result.seed] = result
        # In one order, whatever order they were made in: sums of floats depend on it.
        self.results = {
            key: sorted(images.values(), key=lambda each: (each.seed, each.prompt)) for key, images in grouped.items()
        }
        self.candidates = tuple(candidate for candidate in self.spec.candidates if candidate.key in self.results)
        self.metrics = tuple(
            metric
            for metric in self.spec.metrics
            if any(metric in result.scores for some in self.results.values() for result in some)
        )

    @property
    def steps(self) -> tuple[int, ...]:
        """The schedules that have results."""
        return tuple(dict.fromkeys(candidate.steps for candidate in self.candidates))

    @property
    def prompt_metrics(self) -> tuple[str, ...]:
        """The metrics that judge an image by its prompt."""
        return tuple(metric for metric in self.metrics if measure_of(metric).of_prompt)

    @property
    def headline(self) -> tuple[str, ...]:
        """What methods are judged by: the metrics that judge by the prompt, or else the first against the full run."""
        return self.prompt_metrics or self.metrics[:1]

    def find(self, method: str, steps: int, keep_ratio: float | None = None) -> Candidate | None:
        """The first candidate, not quantized, of a method and schedule, at one keep ratio if it is given."""
        return next(
            (
                candidate
                for candidate in self.candidates
                if (candidate.method, candidate.steps, candidate.quantization) == (method, steps, "")
                and keep_ratio in (None, candidate.keep_ratio)
            ),
            None,
        )

    def fewer_steps(self, candidate: Candidate) -> Candidate | None:
        """As many full steps as cost what a candidate does; None for a full run and a named schedule's own cost."""
        if candidate.method == FULL or tuned_full_steps(candidate.method) is not None:
            return None
        return self.find(FEWER_STEPS, candidate.steps, candidate.keep_ratio)

    def of(self, candidate: Candidate | None) -> list[ImageResult]:
        """The results of a candidate; of None, none."""
        return [] if candidate is None else self.results[candidate.key]

    def full_runs(self, steps: int) -> list[Candidate]:
        """The full runs of a schedule: the one that the others are compared with, if it has results, and quantized."""
        return [each for each in self.candidates if each.steps == steps and each.method == FULL]

    @property
    def has_cpu_seconds(self) -> bool:
        """Whether any image says what it took of the processors."""
        return any(result.cpu_seconds is not None for some in self.results.values() for result in some)

    def cpu_seconds(self, candidate: Candidate) -> float | None:
        """The median of what an image took of the processors; None where earlier versions made all."""
        found = [each.cpu_seconds for each in self.of(candidate) if each.cpu_seconds is not None]
        return median(found) if found else None

    def ratios(self, steps: int) -> tuple[float, ...]:
        """The keep ratios of a schedule, ascending."""
        return tuple(sorted({candidate.keep_ratio for candidate in self._less_than_full(steps)}))

    def at(self, steps: int, keep_ratio: float) -> list[Candidate]:
        """The candidates of a schedule and ratio: CAT and its variations, forecast, fewer steps, AT-EDM, the others.

        A method is followed by itself, quantized.
        """
        first = {MAIN_METHOD: 0, FORECAST: 1, FEWER_STEPS: 2, AT_EDM: 3}
        found = [candidate for candidate in self._less_than_full(steps) if candidate.keep_ratio == keep_ratio]
        methods = list(dict.fromkeys(candidate.method for candidate in found))
        return sorted(
            found, key=lambda each: (first.get(policy_of(each.method), len(first)), methods.index(each.method))
        )

    def _less_than_full(self, steps: int) -> list[Candidate]:
        return [each for each in self.candidates if each.steps == steps and each.method != FULL]

    def scored(self) -> tuple[int, int]:
        """How many images have results, and how many will have them."""
        wanted = {candidate.key: min(candidate.prompts, len(self.spec.prompts)) for candidate in self.spec.candidates}
        done = sum(result.prompt < wanted.get(key, 0) for key, some in self.results.items() for result in some)
        return done, sum(wanted.values()) * self.spec.seeds
