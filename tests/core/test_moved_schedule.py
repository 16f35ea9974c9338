"""That rows moved to other timesteps are those that the timesteps ask for."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest

from cat_pruning.errors import ScheduleError
from cat_pruning.moved_schedule import can_move, lines, move
from cat_pruning.schedule import Schedule
from cat_pruning.settings import PruneSettings
from cat_pruning.timeline import at_timesteps

TIMESTEPS = (1000.0, 900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0, 100.0)
OTHERS = (1000.0, 950.0, 900.0, 850.0, 800.0, 700.0, 600.0, 500.0, 300.0, 200.0)
FULL = (0, 1, 4, 7)
WEIGHTS: Mapping[int, Mapping[int, float]] = {
    2: {0: -0.9, 1: 1.9},
    3: {0: -1.8, 1: 2.8},
    5: {1: -0.3, 4: 1.3},
    6: {0: 0.1, 1: -0.8, 4: 1.7},
    9: {4: -0.7, 7: 1.7},  # 8 repeats step 7
}
NEGATIVE = {step: {read: 2 * weight for read, weight in row.items()} for step, row in WEIGHTS.items()}
SCHEDULE = Schedule.of(len(TIMESTEPS), FULL, WEIGHTS, NEGATIVE, timesteps=TIMESTEPS)


def test_at_its_own_timesteps_a_schedule_stays() -> None:
    moved = move(SCHEDULE, TIMESTEPS)
    assert moved.full_steps == FULL
    for step, row in WEIGHTS.items():
        found = {read: weight for read, weight in moved.steps[step].weights.items() if weight}
        assert found == pytest.approx(row)
        assert moved.steps[step].negative[max(row)] == pytest.approx(2 * row[max(row)])
    assert {read for read, weight in moved.steps[8].weights.items() if weight} == {7}


def test_at_others_full_steps_are_the_nearest_and_weights_between_the_rows() -> None:
    moved = move(SCHEDULE, OTHERS)
    assert moved.full_steps == (0, 2, 6, 8)
    assert moved.timesteps == OTHERS
    assert moved.steps[1].weights == {0: 1.0}  # the old schedule has no row there
    halfway = moved.steps[3]  # between the full step at 900 and the row at 800
    assert halfway.weights == pytest.approx({0: -0.45, 2: 1.45})
    assert halfway.negative == pytest.approx({0: -0.9, 2: 2.4})
    assert moved.steps[9].weights == pytest.approx({8: 1.0, 6: 0.0})  # a third of the way to 0, where row 8 repeats


def test_the_unit_of_timesteps_does_not_matter() -> None:
    small = SCHEDULE.model_copy(update={"timesteps": tuple(each / 1000 for each in TIMESTEPS)})
    moved = move(small, tuple(each / 1000 for each in OTHERS))
    assert moved.full_steps == move(SCHEDULE, OTHERS).full_steps
    for one, other in zip(moved.steps, move(SCHEDULE, OTHERS).steps, strict=True):
        assert one.weights == pytest.approx(other.weights)


def test_full_steps_stay_as_many_where_timesteps_are_dense_elsewhere() -> None:
    late = (1000.0, 300.0, 290.0, 280.0, 270.0, 260.0, 250.0, 240.0, 230.0, 220.0)
    assert len(move(SCHEDULE, late).full_steps) == len(FULL)


def test_one_set_of_weights_stays_one() -> None:
    alone = Schedule.of(len(TIMESTEPS), FULL, WEIGHTS, timesteps=TIMESTEPS)
    assert not any(step.negative for step in move(alone, OTHERS).steps)


def test_lines_go_through_the_last_two_full_steps() -> None:
    found = lines((0, 2, 3), [1.0, 0.9, 0.7, 0.6, 0.4])
    assert found == {1: {0: 1.0}, 4: pytest.approx({2: -2.0, 3: 3.0})}


def test_settings_are_moved_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    move.cache_clear()
    settings = PruneSettings.tuned(SCHEDULE)
    with caplog.at_level(logging.WARNING, "cat_pruning"):
        twice_each = [each for each in OTHERS for _ in range(2)]  # Heun's
        moved = [at_timesteps(settings, timesteps) for timesteps in (OTHERS, OTHERS, twice_each)]
        assert at_timesteps(settings, TIMESTEPS) is settings
        assert at_timesteps(settings, TIMESTEPS[4:]) is settings
        assert at_timesteps(settings, ()) is settings
    assert {each.schedule for each in moved} == {move(SCHEDULE, OTHERS)}
    (record,) = caplog.records
    message = "10-4 is for timesteps 1000, 900 … 100, this run has 1000, 950 … 200: its rows are moved"
    assert message in record.getMessage()


@pytest.mark.parametrize(
    "timesteps",
    [OTHERS[:-1], (*OTHERS, 50.0), (890.0, *OTHERS[1:]), (*OTHERS[:-1], 300.0), tuple(reversed(OTHERS)), (990.0,)],
    ids=["fewer", "more", "another beginning", "a pair alike", "rising", "one"],
)
def test_what_is_not_moved_is_refused(timesteps: tuple[float, ...]) -> None:
    assert not can_move(SCHEDULE, timesteps)
    with pytest.raises(ScheduleError, match="10-4 is for the 10 steps at timesteps 1000, 900 … 100; this run has"):
        at_timesteps(PruneSettings.tuned(SCHEDULE), timesteps)


def test_pruned_rows_are_not_moved() -> None:
    pruned = Schedule.of(len(TIMESTEPS), FULL, WEIGHTS, pruned=(8,), timesteps=TIMESTEPS)
    assert not can_move(pruned, OTHERS)
