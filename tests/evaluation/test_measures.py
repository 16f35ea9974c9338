from __future__ import annotations

import pytest

from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.intervals import Interval
from cat_pruning.evaluation.measures import MEASURES, measure_of
from cat_pruning.evaluation.metrics import Metric


def interval(low: float, high: float) -> Interval:
    return Interval(mean=(low + high) / 2, low=low, high=high, count=9, left_out=0, prompts=9)


@pytest.mark.parametrize(
    ("metric", "low", "high", "says"),
    [
        ("coverage", 0.1, 0.2, "better"),
        ("coverage", -0.2, -0.1, "worse"),
        ("coverage", -0.1, 0.2, "no difference shown"),
        ("coverage", 0.0, 0.0, "no difference shown"),
        ("latents_error", 0.1, 0.2, "worse"),
        ("latents_error", -0.2, -0.1, "better"),
    ],
)
def test_the_verdict_follows_from_the_interval(metric: str, low: float, high: float, says: str) -> None:
    assert measure_of(metric).verdict(interval(low, high)) == says


def test_every_metric_can_be_read() -> None:
    assert set(MEASURES) == {metric.score for metric in Metric}
    for metric in set(Metric) - {Metric.TRUTH}:  # which judges by neither
        assert measure_of(metric.score).of_prompt != metric.needs_reference
    with pytest.raises(SettingsError, match="'fid' is not known"):
        measure_of("fid")
