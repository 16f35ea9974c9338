"""The scores of two candidates on the same prompts and seeds: their means, and the interval of their difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cat_pruning.evaluation.intervals import Interval, mean_interval
from cat_pruning.evaluation.results import ImageResult


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedScores:
    """Two candidates on the prompts and seeds that both have.

    Attributes:
        mean_a, mean_b: of each.
        difference: of a's score less b's.
    """

    mean_a: float
    mean_b: float
    difference: Interval

    @property
    def percent(self) -> Interval | None:
        """The difference in percent of b's mean, which is taken as known; None where that is not positive."""
        return self.difference.scaled(100 / self.mean_b) if self.mean_b > 0 else None


def score_interval(results: Sequence[ImageResult], metric: str) -> Interval | None:
    """`mean_interval` of one candidate's metric; images without it do not count. None if there is nothing finite."""
    scored = [result for result in results if metric in result.scores]
    return mean_interval([result.scores[metric] for result in scored], [result.prompt for result in scored])


def paired_scores(a: Sequence[ImageResult], b: Sequence[ImageResult], metric: str) -> PairedScores | None:
    """Two candidates on the same prompts and seeds; the others are left out.

    A prompt that is easy or hard is so for both. Pairing cancels that out: the interval is of the difference alone.

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
    return PairedScores(mean_a=mean_a.mean, mean_b=mean_b.mean, difference=difference)


def paired_difference(a: Sequence[ImageResult], b: Sequence[ImageResult], metric: str) -> Interval | None:
    """The interval of a's score less b's, of `paired_scores`; None if they share nothing."""
    paired = paired_scores(a, b, metric)
    return None if paired is None else paired.difference
