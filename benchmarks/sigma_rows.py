"""Rows of a schedule at other sigmas than it was fitted to; for trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cat_pruning.schedule import Schedule


def lines(full: Sequence[int], sigmas: Sequence[float]) -> dict[int, dict[int, float]]:
    """The weights of the line through the last two full steps; before the second one, of the last."""
    weights: dict[int, dict[int, float]] = {}
    for step in sorted(set(range(len(sigmas))) - set(full)):
        *_, first, last = [-1, *(before for before in full if before < step)]
        beyond = (sigmas[step] - sigmas[last]) / (sigmas[last] - sigmas[first]) if first >= 0 else 0.0
        weights[step] = {last: 1.0 + beyond} | ({first: -beyond} if first >= 0 else {})
    return weights


def by_sigma(schedule: Schedule, sigmas: Sequence[float]) -> Schedule:
    """A schedule for other sigmas: each full step at the nearest one, the weights between them interpolated.

    Between the full steps at s and s', a row at sigma has the place (sigma - s) / (s' - s) in [0, 1); its weights there
    are linear between those of the old rows, and of the full step itself at place 0. Where the old schedule has no row
    between two full steps, those of the line.
    """
    assert schedule.timesteps is not None
    old, old_full, count = [t / 1000 for t in schedule.timesteps], schedule.full_steps, len(sigmas)
    full: list[int] = []
    for left, row in zip(range(len(old_full), 0, -1), old_full, strict=True):
        possible = range(full[-1] + 1 if full else 0, count - left + 1)
        full.append(min(possible, key=lambda step: abs(sigmas[step] - old[row])) if full else 0)
    renamed = dict(zip(old_full, full, strict=True))
    weights, negative = lines(full, sigmas), dict[int, dict[int, float]]()
    for position, last in enumerate(full):
        old_ends, ends = (*old_full, len(old)), (*full, count)
        rows = range(old_ends[position] + 1, old_ends[position + 1])
        place = _places(old, old_ends[position], old_ends[position + 1])
        new_place = _places(sigmas, last, ends[position + 1])
        for step in range(last + 1, ends[position + 1]) if rows else ():
            for found, of in ((weights, "weights"), (negative, "negative")):
                table: list[Mapping[int, float]] = [getattr(schedule.steps[row], of) for row in rows]
                found[step] = {
                    renamed[read]: float(
                        np.interp(
                            new_place(step),
                            [0.0, *(place(row) for row in rows)],
                            [float(renamed[read] == last), *(each.get(read, 0.0) for each in table)],
                        )
                    )
                    for read in dict.fromkeys(read for each in table for read in each)
                }
    return Schedule.of(count, full, weights, {step: row for step, row in negative.items() if row})


def _places(sigmas: Sequence[float], last: int, following: int) -> Callable[[int], float]:
    end = sigmas[following] if following < len(sigmas) else 0.0
    return lambda step: (sigmas[step] - sigmas[last]) / (end - sigmas[last])


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
