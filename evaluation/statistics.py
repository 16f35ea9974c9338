"""What an evaluation's scores say: means, differences, and 95 % intervals that know which images share a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.methods import AT_EDM, FORECAST, policy_of
from cat_pruning.evaluation.results import ImageResult, load_results, load_spec
from cat_pruning.evaluation.variants import FEWER_STEPS, FULL, Variant

# Student's t, 97.5 %, of 1 to 10 degrees of freedom; an expansion gives the others.
_T_TABLE = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
MAIN_METHOD = "cat"  # what an evaluation is about, if it was compared
_NORMAL = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How people read a metric.

    Attributes:
        title: with its unit. digits: after the point. higher_is_better: or else lower.
        of_prompt: whether it judges an image by its prompt, the full run's too; the others compare with the full run.
    """

    title: str
    digits: int
    higher_is_better: bool = True
    of_prompt: bool = False


MEASURES = {
    "scene_score": Measure(title="scene score", digits=3, of_prompt=True),
    "clip_score": Measure(title="CLIP score", digits=2, of_prompt=True),
    "psnr_db": Measure(title="PSNR (dB)", digits=2),
    "ssim": Measure(title="SSIM", digits=3),
    "latents_error": Measure(title="latents, relative error", digits=3, higher_is_better=False),
}


def measure_of(metric: str) -> Measure:
    """How to read a metric by its name in `ImageResult.scores`.

    Raises:
        SettingsError: it is not known.
    """
    if metric not in MEASURES:
        raise SettingsError(f"metric {metric!r} is not known; known are {', '.join(MEASURES)}")
    return MEASURES[metric]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its 95 % confidence interval.

    Attributes:
        mean: of the prompts' means.
        low, high: -inf and inf where there is one prompt, which does not show how prompts differ.
        count: finite values in it; those that are None (an infinite PSNR), infinite or NaN are not.
        left_out: how many those were.
        prompts: how many the values are of.
    """

    mean: float
    low: float
    high: float
    count: int
    left_out: int
    prompts: int

    @property
    def half_width(self) -> float:
        """Half the interval's length."""
        return (self.high - self.low) / 2

    def scaled(self, factor: float) -> Interval:
        """The interval in another unit; `factor` is positive."""
        return Interval(
            mean=self.mean * factor,
            low=self.low * factor,
            high=self.high * factor,
            count=self.count,
            left_out=self.left_out,
            prompts=self.prompts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two variants on the prompts and seeds that both have: means of each, and the interval of a's less b's."""

    mean_a: float
    mean_b: float
    difference: Interval

    @property
    def percent(self) -> Interval | None:
        """The difference in percent of b's mean, which is taken as known; None where that is not positive."""
        return self.difference.scaled(100 / self.mean_b) if self.mean_b > 0 else None


class Evaluation:
    """What a directory holds, by variant.

    Args:
        directory: that a `ResultStore` wrote.

    Raises:
        SettingsError: no evaluation, or no results yet.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.spec = directory, load_spec(directory)
        found = load_results(directory)
        if not found:
            raise SettingsError(f"{directory} has no results yet", "start the same cat-eval again, it goes on there")
        grouped: dict[str, dict[tuple[int, int], ImageResult]] = {}
        for result in found:
            grouped.setdefault(result.variant, {})[result.prompt, result.seed] = result
        self.results = {key: list(images.values()) for key, images in grouped.items()}
        self.variants = tuple(variant for variant in self.spec.variants if variant.key in self.results)
        self.metrics = tuple(
            metric
            for metric in self.spec.metrics
            if any(metric in result.scores for some in self.results.values() for result in some)
        )

    @property
    def steps(self) -> tuple[int, ...]:
        """The schedules that have results."""
        return tuple(dict.fromkeys(variant.steps for variant in self.variants))

    @property
    def prompt_metrics(self) -> tuple[str, ...]:
        """The metrics that judge an image by its prompt."""
        return tuple(metric for metric in self.metrics if measure_of(metric).of_prompt)

    def find(self, method: str, steps: int, keep_ratio: float | None = None) -> Variant | None:
        """A variant that has results, at any ratio or one."""
        return next(
            (
                variant
                for variant in self.variants
                if (variant.method, variant.steps) == (method, steps) and keep_ratio in (None, variant.keep_ratio)
            ),
            None,
        )

    def of(self, variant: Variant | None) -> list[ImageResult]:
        """The results of a variant; of None, none."""
        return [] if variant is None else self.results[variant.key]

    def ratios(self, steps: int) -> tuple[float, ...]:
        """The keep ratios of a schedule, ascending."""
        return tuple(sorted({v.keep_ratio for v in self.variants if v.steps == steps and v.method != FULL}))

    def at(self, steps: int, keep_ratio: float) -> list[Variant]:
        """The variants of a schedule and ratio: CAT and its variations, forecast, fewer steps, AT-EDM, the others."""
        first = {MAIN_METHOD: 0, FORECAST: 1, FEWER_STEPS: 2, AT_EDM: 3}
        found = [v for v in self.variants if v.steps == steps and v.method != FULL and v.keep_ratio == keep_ratio]
        return sorted(found, key=lambda variant: first.get(policy_of(variant.method), len(first)))

    def scored(self) -> tuple[int, int]:
        """Images that have results, and that will have them."""
        wanted = {variant.key: min(variant.prompts, len(self.spec.prompts)) for variant in self.spec.variants}
        done = sum(result.prompt < wanted.get(key, 0) for key, some in self.results.items() for result in some)
        return done, sum(wanted.values()) * self.spec.seeds


def mean_interval(values: Sequence[float | None], prompts: Sequence[int]) -> Interval | None:
    """The mean of scores, with a 95 % interval for other prompts of the same kind.

    Images of one prompt are not independent, so they are averaged first: with the means of n prompts m_i and their
    standard deviation s, the interval is mean(m) ± t(n - 1) · s / √n, Student's.

    Args:
        values: of the images. What is not finite, or None, is left out and counted.
        prompts: the prompts' numbers, one for each value.

    Returns:
        None if no value is finite.

    Raises:
        ValueError: `values` and `prompts` differ in length.
    """
    if len(values) != len(prompts):
        raise ValueError(f"{len(values)} values of {len(prompts)} prompts' numbers: expected one for each")
    numbers = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    finite = np.isfinite(numbers)
    if not finite.any():
        return None
    means = _prompt_means(numbers[finite], np.asarray(prompts)[finite])
    mean, count = float(means.mean()), len(means)
    half = student_t(count - 1) * float(means.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return Interval(
        mean=mean,
        low=mean - half,
        high=mean + half,
        count=int(finite.sum()),
        left_out=int((~finite).sum()),
        prompts=count,
    )


def score_interval(results: Sequence[ImageResult], metric: str) -> Interval | None:
    """`mean_interval` of a metric; images without it do not count. None if there is nothing finite."""
    scored = [result for result in results if metric in result.scores]
    return mean_interval([result.scores[metric] for result in scored], [result.prompt for result in scored])


def compare(a: Sequence[ImageResult], b: Sequence[ImageResult], metric: str) -> Comparison | None:
    """Two variants on the same prompts and seeds; the others are left out.

    Paired, what makes a prompt easy or hard for both cancels out, and the interval is that of the difference alone.

    Returns:
        None if no prompt and seed has a finite score of both.
    """
    others = {(result.prompt, result.seed): result.scores.get(metric) for result in b}
    pairs = [
        (result.prompt, result.scores[metric], others[result.prompt, result.seed])
        for result in a
        if metric in result.scores and (result.prompt, result.seed) in others
    ]
    rows = [
        (prompt, mine, other)
        for prompt, mine, other in pairs
        if mine is not None and other is not None and math.isfinite(mine) and math.isfinite(other)
    ]
    prompts = [prompt for prompt, _, _ in rows]
    difference = mean_interval([mine - other for _, mine, other in rows], prompts)
    mean_a = mean_interval([mine for _, mine, _ in rows], prompts)
    mean_b = mean_interval([other for _, _, other in rows], prompts)
    if difference is None or mean_a is None or mean_b is None:
        return None
    return Comparison(mean_a=mean_a.mean, mean_b=mean_b.mean, difference=difference)


def paired_difference(a: Sequence[ImageResult], b: Sequence[ImageResult], metric: str) -> Interval | None:
    """The interval of a's score less b's, of `compare`; None if they share nothing."""
    comparison = compare(a, b, metric)
    return None if comparison is None else comparison.difference


def verdict(difference: Interval, measure: Measure) -> str:
    """Whether a is better or worse than b, in the words that the interval allows."""
    if difference.low <= 0 <= difference.high:
        return "no difference shown"
    return "better" if (difference.mean > 0) == measure.higher_is_better else "worse"


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, within 0.0002.

    From 11 degrees of freedom on the expansion of Abramowitz and Stegun, 26.7.5.

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"degrees={degrees}: expected a number >= 1")
    if degrees <= len(_T_TABLE):
        return _T_TABLE[degrees - 1]
    z = _NORMAL
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / float(degrees) ** power for power, term in enumerate(terms, start=1))


def _prompt_means(values: NDArray[np.float64], prompts: NDArray[np.int_]) -> NDArray[np.float64]:
    """One mean for each prompt: (prompts,)."""
    _, group = np.unique(prompts, return_inverse=True)
    return np.bincount(group, weights=values) / np.bincount(group)
