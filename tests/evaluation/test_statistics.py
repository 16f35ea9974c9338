from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.metrics import Metric
from cat_pruning.evaluation.results import ImageResult
from cat_pruning.evaluation.statistics import (
    MEASURES,
    Interval,
    compare,
    mean_interval,
    measure_of,
    paired_difference,
    score_interval,
    student_t,
    verdict,
)


def some(variant: str, values: dict[tuple[int, int], float | None], metric: str = "scene_score") -> list[ImageResult]:
    return [
        ImageResult(variant=variant, prompt=prompt, seed=seed, seconds=1.0, scores={metric: value})
        for (prompt, seed), value in values.items()
    ]


def interval(low: float, high: float) -> Interval:
    return Interval(mean=(low + high) / 2, low=low, high=high, count=9, left_out=0, prompts=9)


def of(values: list[float | None], prompts: list[int]) -> Interval:
    found = mean_interval(values, prompts)
    assert found is not None
    return found


@pytest.mark.parametrize("degrees", [1, 2, 9, 10, 11, 12, 20, 31, 63, 499, 5000])
def test_students_quantile(degrees: int) -> None:
    assert student_t(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), abs=2e-4)


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
    assert verdict(found, measure_of("scene_score")) == "no difference shown"


def test_values_without_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 values of 1"):
        mean_interval([1.0, 2.0], [0])


def test_images_without_a_metric_have_no_score() -> None:
    assert score_interval(some("full", {(0, 0): 1.0}), "psnr_db") is None


def test_a_paired_difference_is_of_what_both_have() -> None:
    a = some("a", {(0, 0): 0.5, (0, 1): 0.7, (1, 0): 0.4, (2, 0): 0.9, (3, 0): None})
    b = some("b", {(0, 0): 0.4, (0, 1): 0.4, (1, 0): 0.5, (3, 0): 0.1, (4, 0): 0.0})
    found = compare(a, b, "scene_score")
    assert found is not None
    assert found.difference.mean == pytest.approx(((0.1 + 0.3) / 2 - 0.1) / 2)
    assert (found.mean_a, found.mean_b) == pytest.approx(((0.6 + 0.4) / 2, (0.4 + 0.5) / 2))
    assert (found.difference.count, found.difference.prompts) == (3, 2)
    percent = found.percent
    assert percent is not None
    assert percent.mean == pytest.approx(100 * found.difference.mean / 0.45)


def test_pairing_takes_away_what_prompts_differ_by() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.normal(0.7, 0.15, 40)
    a = some("a", {(k, 0): float(value - 0.02 + rng.normal(0, 0.01)) for k, value in enumerate(prompts)})
    b = some("b", {(k, 0): float(value) for k, value in enumerate(prompts)})
    paired, alone = paired_difference(a, b, "scene_score"), score_interval(a, "scene_score")
    assert paired is not None
    assert alone is not None
    assert paired.half_width < 0.2 * alone.half_width
    assert verdict(paired, measure_of("scene_score")) == "worse"


def test_nothing_shared_has_no_difference() -> None:
    assert paired_difference(some("a", {(0, 0): 1.0}), some("b", {(0, 1): 1.0}), "scene_score") is None
    assert paired_difference(some("a", {(0, 0): 1.0}), [], "scene_score") is None


@pytest.mark.parametrize(
    ("metric", "low", "high", "says"),
    [
        ("scene_score", 0.1, 0.2, "better"),
        ("scene_score", -0.2, -0.1, "worse"),
        ("scene_score", -0.1, 0.2, "no difference shown"),
        ("scene_score", 0.0, 0.0, "no difference shown"),
        ("latents_error", 0.1, 0.2, "worse"),
        ("latents_error", -0.2, -0.1, "better"),
    ],
)
def test_the_verdict_follows_from_the_interval(metric: str, low: float, high: float, says: str) -> None:
    assert verdict(interval(low, high), measure_of(metric)) == says


def test_every_metric_can_be_read() -> None:
    assert set(MEASURES) == {metric.score for metric in Metric}
    assert all(measure_of(metric.score).of_prompt != metric.needs_reference for metric in Metric)
    with pytest.raises(SettingsError, match="'lpips' is not known"):
        measure_of("lpips")
