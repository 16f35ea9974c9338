"""A schedule at other timesteps than it was fitted to, as another shift of the scheduler brings them."""

from __future__ import annotations

import bisect
import functools
import itertools
import logging
from collections.abc import Mapping, Sequence

from cat_pruning.schedule import Schedule, ScheduledStep, StepKind, shown

logger = logging.getLogger(__name__)

_BEGINNING = 0.05  # of the first timestep: what the first ones may be apart


def can_move(schedule: Schedule, timesteps: Sequence[float]) -> bool:
    """Whether `move` takes these timesteps: as many as the schedule has, falling, from about the same noise.

    A schedule moves if its timesteps fall and none of its steps is pruned.

    Args:
        schedule: with timesteps.
        timesteps: of a whole run, one a step.
    """
    old = schedule.timesteps or ()
    return (
        len(timesteps) == len(old) > 1
        and all(_falls(each) for each in (old, timesteps))
        and abs(timesteps[0] - old[0]) <= _BEGINNING * old[0]
        and all(step.kind is not StepKind.PRUNED for step in schedule.steps)
    )


@functools.lru_cache(maxsize=16)
def move(schedule: Schedule, timesteps: tuple[float, ...]) -> Schedule:
    """A schedule for other timesteps: each full step at the nearest one, the weights between them interpolated.

    A row at t between full steps at s and s' has the place (t - s) / (s' - s) in [0, 1). Its weights are linear in the
    place between those of the old rows; at place 0 they are the full step itself. Where the old schedule has no row
    between two full steps, they are those of the line through the last two. After the last full step, s' is 0. Nothing
    else than proportions of timesteps matters, so they may be of any unit. The first time for these timesteps it is
    logged as a warning.

    Args:
        schedule: with timesteps.
        timesteps: for which `can_move` holds.

    Returns:
        A schedule made for the same, at `timesteps`; nothing is measured of it.
    """
    assert can_move(schedule, timesteps)
    assert schedule.timesteps is not None
    full = _nearest(schedule, timesteps)
    renamed = dict(zip(schedule.full_steps, full, strict=True))
    weights, negative = lines(full, timesteps), dict[int, dict[int, float]]()
    old_gaps = itertools.pairwise((*schedule.full_steps, len(timesteps)))
    gaps = itertools.pairwise((*full, len(timesteps)))
    for old_gap, gap in zip(old_gaps, gaps, strict=True):
        rows = range(old_gap[0] + 1, old_gap[1])
        places = [0.0, *(_place(schedule.timesteps, old_gap, row) for row in rows)]
        for step in range(gap[0] + 1, gap[1]) if rows else ():
            place = _place(timesteps, gap, step)
            for found, of in ((weights, _weights), (negative, _negative)):
                table = [{old_gap[0]: 1.0}, *(of(schedule.steps[row], old_gap[0]) for row in rows)]
                reads = dict.fromkeys(read for row in table for read in row)
                found[step] = {
                    renamed[read]: _between(place, places, [row.get(read, 0.0) for row in table]) for read in reads
                }
    logger.warning(
        "the schedule %s is for timesteps %s, this run has %s: its rows are moved to them. Images differ more from the "
        "full run's than with a schedule that is tuned for these timesteps",
        schedule.name,
        shown(schedule.timesteps),
        shown(timesteps),
    )
    return Schedule.of(
        len(timesteps),
        full,
        weights,
        negative if any(step.negative for step in schedule.steps) else None,
        timesteps=timesteps,
        made_for=schedule.made_for,
    )


def lines(full: Sequence[int], timesteps: Sequence[float]) -> dict[int, dict[int, float]]:
    """The weights of the line through the last two full steps; before the second one, of the last."""
    weights: dict[int, dict[int, float]] = {}
    for step in sorted(set(range(len(timesteps))) - set(full)):
        *_, first, last = [-1, *(before for before in full if before < step)]
        beyond = (timesteps[step] - timesteps[last]) / (timesteps[last] - timesteps[first]) if first >= 0 else 0.0
        weights[step] = {last: 1.0 + beyond} | ({first: -beyond} if first >= 0 else {})
    return weights


def _falls(timesteps: Sequence[float]) -> bool:
    return all(before > after for before, after in itertools.pairwise(timesteps))


def _nearest(schedule: Schedule, timesteps: Sequence[float]) -> list[int]:
    """The steps nearest to the old full steps, as many; the first is 0."""
    assert schedule.timesteps is not None
    full = [0]
    for left, row in zip(range(len(schedule.full_steps) - 1, 0, -1), schedule.full_steps[1:], strict=True):
        possible = range(full[-1] + 1, len(timesteps) - left + 1)
        full.append(min(possible, key=lambda step: abs(timesteps[step] - schedule.timesteps[row])))  # type: ignore[index]
    return full


def _place(timesteps: Sequence[float], gap: tuple[int, int], step: int) -> float:
    """Where a step lies between two full ones; the end of the timesteps is 0."""
    last, following = gap
    end = timesteps[following] if following < len(timesteps) else 0.0
    return (timesteps[step] - timesteps[last]) / (end - timesteps[last])


def _between(place: float, places: Sequence[float], values: Sequence[float]) -> float:
    """The value at a place, linear between those at `places`, which rise from 0; the last one after them."""
    after = bisect.bisect_right(places, place)
    if after == len(places):
        return values[-1]
    part = (place - places[after - 1]) / (places[after] - places[after - 1])
    return values[after - 1] + part * (values[after] - values[after - 1])


def _weights(row: ScheduledStep, last: int) -> Mapping[int, float]:
    return row.weights or {last: 1.0}


def _negative(row: ScheduledStep, last: int) -> Mapping[int, float]:
    return row.negative or _weights(row, last)
