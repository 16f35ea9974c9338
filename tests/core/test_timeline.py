from __future__ import annotations

import math

import pytest

from cat_pruning.errors import ScheduleError
from cat_pruning.schedule import FULL_STEP, Schedule, ScheduledStep, StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.timeline import begun_late, last_read, reference_step, scheduled_step, step_kind, step_kinds

TABLE = Schedule.of(6, (0, 1, 4), {3: {0: -1.0, 1: 2.0}}, pruned=(2,))
FORECAST = PruneSettings.preset("forecast")


def full_steps(num_steps: int, settings: PruneSettings) -> list[int]:
    return [step for step, kind in enumerate(step_kinds(num_steps, settings)) if kind is StepKind.FULL]


def test_paper_schedule_has_full_steps_at_the_start_only() -> None:
    kinds = step_kinds(28, PruneSettings(full_steps=8))
    assert kinds == [StepKind.FULL] * 8 + [StepKind.PRUNED] * 20


@pytest.mark.parametrize(
    ("first", "every", "expected"),
    [
        (4, 3, [0, 1, 2, 3, 5, 8, 11, 14, 17, 20, 23, 26]),
        (4, 6, [0, 1, 2, 3, 6, 12, 18, 24]),
        (4, 2, [0, 1, 2, 3, *range(4, 28, 2)]),
        (2, 1, [*range(28)]),
        (8, 40, [*range(8), 27]),
        (8, 0, [*range(8)]),
    ],
)
def test_every_kth_step_is_full_from_half_an_interval_on(first: int, every: int, expected: list[int]) -> None:
    assert full_steps(28, PruneSettings(full_steps=first, refresh_every=every)) == expected


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_an_image_of_fewer_steps_than_full_steps_is_all_full(num_steps: int) -> None:
    assert step_kinds(num_steps, PruneSettings(full_steps=4)) == [StepKind.FULL] * num_steps


def test_a_step_by_rule_after_the_last_planned_one_has_a_kind() -> None:
    assert step_kind(10_000, PruneSettings()) is StepKind.PRUNED


def test_steps_of_no_tokens_are_forecasts() -> None:
    assert step_kind(5, FORECAST) is StepKind.FORECAST
    assert step_kind(5, FORECAST.replace(keep_ratio=0.1)) is StepKind.PRUNED


def test_a_table_says_the_kinds() -> None:
    kinds = step_kinds(6, PruneSettings.tuned(TABLE))
    assert "".join(kind[0] for kind in kinds) == "ffpfff"
    assert [kind for kind in kinds if kind is StepKind.FORECAST] == [StepKind.FORECAST] * 2


def test_a_table_has_no_more_steps_than_rows() -> None:
    with pytest.raises(ScheduleError, match="has 6 steps, this run has more"):
        step_kinds(7, PruneSettings.tuned(TABLE))


def test_a_row_by_rule_is_the_line_through_the_last_two_full_steps() -> None:
    timesteps = [1000.0, 900.0, 820.0, 750.0, 700.0, 640.0]
    row = scheduled_step(5, timesteps, FORECAST)  # 3 and 4 are full
    assert row.kind is StepKind.FORECAST
    for offset, slope in ((3.0, 0.0), (-1.0, 0.02)):
        line = [offset + slope * timestep for timestep in timesteps]
        assert math.isclose(sum(weight * line[step] for step, weight in row.weights.items()), line[5], abs_tol=1e-9)
    assert list(row.weights) == [3, 4]


def test_a_row_by_rule_that_repeats_has_no_weights() -> None:
    assert scheduled_step(9, [0.0] * 10, PruneSettings()) == ScheduledStep(kind=StepKind.PRUNED)
    assert scheduled_step(2, [0.0] * 3, PruneSettings()) == FULL_STEP


def test_a_row_of_a_table_is_the_table_s() -> None:
    assert scheduled_step(3, [], PruneSettings.tuned(TABLE)) == TABLE.steps[3]


@pytest.mark.parametrize(
    "settings", [FORECAST, PruneSettings.preset("refreshed"), PruneSettings.tuned(TABLE), PruneSettings()]
)
def test_an_output_is_kept_until_the_last_step_that_reads_it(settings: PruneSettings) -> None:
    num_steps = settings.schedule.num_steps if settings.schedule else 28
    rows = [scheduled_step(step, [float(-at) for at in range(num_steps)], settings) for step in range(num_steps)]
    for step in range(num_steps):
        if rows[step].kind is StepKind.FULL:
            last = max((later for later in range(num_steps) if step in rows[later].weights), default=step)
            assert last <= min(last_read(step, settings), num_steps - 1) <= last + 2  # a refresh may come later


def test_an_output_is_needed_until_two_full_steps_are_after_it() -> None:
    settings = PruneSettings(full_steps=4, refresh_every=2, reuse="extrapolate")  # 0 … 4, 6, 8, … are full
    assert last_read(3, settings) == 5
    assert last_read(2, PruneSettings(full_steps=4)) == 2  # repeated: nothing reads it


def test_the_reference_is_the_last_but_one_of_the_full_steps_at_the_start() -> None:
    assert reference_step(PruneSettings(full_steps=8)) == 6
    assert reference_step(PruneSettings.tuned(TABLE)) == 0
    assert reference_step(PruneSettings.tuned(Schedule.of(9, range(5)))) == 3


@pytest.mark.parametrize(
    ("full", "left", "kinds"),
    [
        (9, 22, "FFFF-F---F---F---F---F"),  # 9 / 28 of 22, and two: 9
        (7, 11, "FF-F--F--F-"),  # 5 of them, fewer than six: two at the start
        (9, 2, "FF"),
        (9, 1, "F"),
    ],
)
def test_an_image_that_begins_late_has_the_share_of_its_schedule(full: int, left: int, kinds: str) -> None:
    weights = {step: {0: 1.0} for step in range(full, 28)}
    settings = PruneSettings.tuned(Schedule.of(28, list(range(full)), weights))
    rule = begun_late(settings, left)
    assert "".join("F" if kind is StepKind.FULL else "-" for kind in step_kinds(left, rule)) == kinds
    assert rule.schedule is None
