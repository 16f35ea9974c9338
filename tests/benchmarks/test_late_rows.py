"""That a late run has the rows that it can have."""

from __future__ import annotations

import pytest
from late_rows import late

from cat_pruning.schedule import Schedule, StepKind

SIGMAS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
FULL = (0, 1, 4, 7)
WEIGHTS = {
    2: {0: -0.9, 1: 1.9},
    3: {0: -1.8, 1: 2.8},
    5: {1: -0.3, 4: 1.3},
    6: {0: 0.1, 1: -0.8, 4: 1.7},
    8: {4: -0.4, 7: 1.4},
    9: {4: -0.7, 7: 1.7},
}
NEGATIVE = {step: {read: 2 * weight for read, weight in row.items()} for step, row in WEIGHTS.items()}


def schedule() -> Schedule:
    timesteps = tuple(1000 * sigma for sigma in SIGMAS)
    return Schedule.of(len(SIGMAS), FULL, WEIGHTS, NEGATIVE, timesteps=timesteps)


def test_a_late_run_keeps_the_rows_whose_reads_it_has() -> None:
    begun = late(schedule(), 3, SIGMAS[3:])
    assert begun.full_steps == (0, 1, 4)
    assert begun.steps[2].weights == pytest.approx({0: -1.0, 1: 2.0})  # the line: row 5 reads step 1
    assert begun.steps[5].weights == pytest.approx({1: -0.4, 4: 1.4})  # row 8, as fitted
    assert begun.steps[5].negative == pytest.approx({1: -0.8, 4: 2.8})
    assert begun.steps[6].kind is StepKind.FORECAST
