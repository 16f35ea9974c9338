from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from cat_pruning.evaluation.intervals import Interval, mean_interval, student_t
from cat_pruning.evaluation.measures import measure_of


def of(values: list[float | None], prompts: list[int]) -> Interval:
    found = mean_interval(values, prompts)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    {
        1: 12.7062,
        2: 4.3027,
        9: 2.2622,
        10: 2.2281,
        11: 2.2010,
        12: 2.1788,
        20: 2.0860,
        31: 2.0395,
        63: 1.9983,
        499: 1.9647,
        5000: 1.9604,
    }.items(),
)
def test_students_quantile(degrees: int, quantile: float) -> None:
    """As tables of Student's t have it."""
    assert student_t(degrees) == pytest.approx(quantile, abs=5e-5)


def test_students_quantile_needs_a_degree_of_freedom() -> None:
    with pytest.raises(ValueError, match="degrees=0"):
        student_t(0)


def test_the_interval_is_students() -> None:
    values = [0.2, 0.5, 0.9, 0.4, 0.7]
    found = of([*values], [0, 1, 2, 3, 4])
    low, high = scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high), abs=1e-4)
    assert (found.count, found.prompts, found.left_out) == (5, 5, 0)
    assert found.half_width == pytest.approx((high - low) / 2, abs=1e-4)


def test_it_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [of(rng.normal(3.0, 1.0, 12).tolist(), list(range(12))) for _ in range(1000)]
    assert 0.93 < np.mean([one.low <= 3.0 <= one.high for one in found]) < 0.97


def test_it_shrinks_with_more_prompts() -> None:
    values = np.random.default_rng(0).normal(size=400).tolist()
    assert of(values, list(range(400))).half_width < 0.6 * of(values[:100], list(range(100))).half_width


def test_seeds_of_a_prompt_count_once() -> None:
    # Four seeds that say the same add nothing: as if each prompt had one.
    prompts = [0, 1, 2, 3, 4, 5]
    values: list[float | None] = [0.1, 0.4, 0.5, 0.5, 0.8, 0.9]
    one, four = of(values, prompts), of(values * 4, prompts * 4)
    assert (four.low, four.high) == pytest.approx((one.low, one.high))
    assert (four.count, four.prompts) == (24, 6)


def test_prompts_weigh_the_same_whatever_their_seeds() -> None:
    assert of([1.0, 1.0, 1.0, 0.0], [0, 0, 0, 1]).mean == 0.5


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    found = of([None, 20.0, math.inf, 30.0, math.nan], [0, 1, 2, 3, 4])
    assert (found.mean, found.count, found.left_out, found.prompts) == (25.0, 2, 3, 2)
    assert math.isfinite(found.low)


@pytest.mark.parametrize("values", [[], [None], [None, math.nan]])
def test_nothing_finite_has_no_mean(values: list[float | None]) -> None:
    assert mean_interval(values, list(range(len(values)))) is None


def test_one_prompt_shows_no_difference() -> None:
    found = of([1.0, 1.1], [7, 7])
    assert (found.mean, found.low, found.high) == (1.05, -math.inf, math.inf)
    assert measure_of("coverage").verdict(found) == "no difference shown"


def test_values_without_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 values of 1"):
        mean_interval([1.0, 2.0], [0])
