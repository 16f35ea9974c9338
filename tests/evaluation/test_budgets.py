"""Settings that cost as much as so many full steps."""

from __future__ import annotations

import pytest

from cat_pruning.evaluation.budgets import cat_at, forecast_at, macs_of_full_steps
from cat_pruning.exporter.macs import ImageMacs
from cat_pruning.schedule import StepKind
from cat_pruning.settings import Policy, PruneSettings, Reuse
from cat_pruning.timeline import step_kinds


def macs(keep_ratio: float) -> ImageMacs:
    """A pruned step has a share that does not go by its tokens, as text rows have."""
    return ImageMacs(full=1000, pruned=round(50 + 950 * keep_ratio), prompt=7, timestep=3)


def test_full_steps() -> None:
    assert macs_of_full_steps(macs(1.0), 9) == 7 + 9 * 1003


@pytest.mark.parametrize("budget", [20, 16, 12, 9, 7, 6, 5])
def test_cat_costs_what_the_budget_does(budget: int) -> None:
    settings = cat_at(budget, 28, PruneSettings(num_clusters=9, reuse=Reuse.EXTRAPOLATE, refresh_every=2), macs)
    cost = macs(settings.keep_ratio).pruned_image(28, settings)
    assert abs(cost - macs_of_full_steps(macs(1.0), budget)) <= 0.51 * 1003
    assert (settings.policy, settings.reuse, settings.refresh_every) == (Policy.CAT, Reuse.REPEAT, 0)
    assert settings.num_clusters == 9


def test_cat_keeps_the_paper_s_ratio_where_it_can() -> None:
    assert [cat_at(budget, 28, PruneSettings(), macs).keep_ratio for budget in (16, 12, 9, 7)] == [0.3, 0.3, 0.1, 0.05]


@pytest.mark.parametrize("budget", [20, 16, 12, 9, 7, 6, 5])
def test_the_forecast_costs_what_the_budget_does(budget: int) -> None:
    settings = forecast_at(budget, 28, macs(1.0))
    assert step_kinds(28, settings).count(StepKind.FULL) == budget
    assert settings.keep_ratio == 0.0
    assert settings.reuse is Reuse.EXTRAPOLATE
