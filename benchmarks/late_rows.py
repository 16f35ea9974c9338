"""Rows of a schedule for a run that begins late; for trials."""

from __future__ import annotations

from collections.abc import Sequence

from cat_pruning.moved_schedule import lines
from cat_pruning.schedule import Schedule


def late(schedule: Schedule, start: int, sigmas: Sequence[float]) -> Schedule:
    """The rows of a schedule from `start` on, for a run that begins there.

    Its first two steps are full. A later forecast whose row reads what was not computed has the weights of the line
    through the last two full steps.

    Args:
        schedule: the rows.
        start: number of the first.
        sigmas: of the run's steps.
    """
    full = sorted({0, 1, *(step - start for step in schedule.full_steps if step >= start)})
    weights, negative = lines(full, sigmas), dict[int, dict[int, float]]()
    for step in weights:
        row = schedule.steps[start + step]
        if row.weights and min(row.weights) >= start and set(row.weights) <= set(schedule.full_steps):
            weights[step] = {read - start: weight for read, weight in row.weights.items()}
            negative[step] = {read - start: weight for read, weight in row.negative.items()}
    return Schedule.of(len(sigmas), full, weights, negative)
