"""The simulation against what is known of queues; the costs are measured elsewhere."""

from __future__ import annotations

import pytest
from step_batching import arrivals, cost_of, simulate, summary

LINEAR = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}
FREE = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}


def test_one_image_at_a_time_is_a_queue_with_equal_services() -> None:
    """M/D/1: the mean wait is load / (2 (1 - load)) of a service (Pollaczek, Khinchine)."""
    comes = arrivals(0.8 / 4.0, 20_000, seed=1)
    found = summary(simulate(comes, 4, LINEAR, 1, by_step=False), comes, 4.0)
    assert found["mean"] == pytest.approx(1 + 0.8 / 0.4, rel=0.1)


def test_where_a_batch_saves_nothing_joining_it_delays_the_others() -> None:
    comes = arrivals(0.8 / 4.0, 5000, seed=2)
    alone, joined = (
        summary(simulate(comes, 4, LINEAR, most, by_step=by_step), comes, 4.0)
        for most, by_step in ((1, False), (4, True))
    )
    assert joined["mean"] > alone["mean"]


def test_where_a_batch_is_free_joining_at_any_step_is_best() -> None:
    comes = arrivals(1.5 / 4.0, 5000, seed=3)
    whole, joined = (summary(simulate(comes, 4, FREE, 4, by_step=by_step), comes, 4.0) for by_step in (False, True))
    assert joined["mean"] < whole["mean"]
    assert joined["throughput"] == pytest.approx(1.5, rel=0.1)


def test_costs_between_those_measured() -> None:
    assert cost_of(3, LINEAR) == 3.0
    assert cost_of(6, FREE) == 1.0
