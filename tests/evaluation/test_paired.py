from __future__ import annotations

import numpy as np
import pytest

from cat_pruning.evaluation.measures import measure_of
from cat_pruning.evaluation.paired import paired_difference, paired_scores, score_interval
from cat_pruning.evaluation.results import ImageResult


def some(candidate: str, values: dict[tuple[int, int], float | None], metric: str = "coverage") -> list[ImageResult]:
    return [
        ImageResult(candidate=candidate, prompt=prompt, seed=seed, seconds=1.0, scores={metric: value})
        for (prompt, seed), value in values.items()
    ]


def test_images_without_a_metric_have_no_score() -> None:
    assert score_interval(some("full", {(0, 0): 1.0}), "psnr_db") is None


def test_a_paired_difference_is_of_what_both_have() -> None:
    a = some("a", {(0, 0): 0.5, (0, 1): 0.7, (1, 0): 0.4, (2, 0): 0.9, (3, 0): None})
    b = some("b", {(0, 0): 0.4, (0, 1): 0.4, (1, 0): 0.5, (3, 0): 0.1, (4, 0): 0.0})
    found = paired_scores(a, b, "coverage")
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
    paired, alone = paired_difference(a, b, "coverage"), score_interval(a, "coverage")
    assert paired is not None
    assert alone is not None
    assert paired.half_width < 0.2 * alone.half_width
    assert measure_of("coverage").verdict(paired) == "worse"


def test_nothing_shared_has_no_difference() -> None:
    assert paired_difference(some("a", {(0, 0): 1.0}), some("b", {(0, 1): 1.0}), "coverage") is None
    assert paired_difference(some("a", {(0, 0): 1.0}), [], "coverage") is None
