"""Means with 95 % confidence intervals, by a distribution that knows which images share a prompt: Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit


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


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, as scipy computes it.

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"degrees={degrees}: expected a number >= 1")
    return float(stdtrit(degrees, 0.975))


def _prompt_means(values: NDArray[np.float64], prompts: NDArray[np.int_]) -> NDArray[np.float64]:
    """One mean for each prompt: (prompts,)."""
    _, group = np.unique(prompts, return_inverse=True)
    return np.bincount(group, weights=values) / np.bincount(group)
