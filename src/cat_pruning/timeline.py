"""What each step of an image computes: a row of `PruneSettings.schedule`, or by rule where that is None.

The rule has F full steps at the start, as the paper's (Cheng, Chen, Jia 2025, algorithm 2), which has no full step
after them. `refresh_every` is ours: every K-th step is full as well. The first of these comes after half an interval,
because an image changes most at its start: with F = 4 and every third step, 5, 8, 11, ….
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

from cat_pruning.errors import ScheduleError
from cat_pruning.moved_schedule import can_move, move
from cat_pruning.schedule import FULL_STEP, ScheduledStep, StepKind
from cat_pruning.settings import PRESETS, Preset, PruneSettings, Reuse


def step_kind(number: int, settings: PruneSettings) -> StepKind:
    """The kind of a step by its number in the image, 0-based.

    Raises:
        ScheduleError: the schedule has no such step.
    """
    if settings.schedule is not None:
        if number >= settings.schedule.num_steps:
            raise ScheduleError(
                f"the schedule {settings.schedule.name} has {settings.schedule.num_steps} steps, this run has more",
                "give fewer steps, or a schedule of as many",
            )
        return settings.schedule.steps[number].kind
    if number < settings.full_steps or _is_refresh(number, settings):
        return StepKind.FULL
    return StepKind.PRUNED if settings.keep_ratio else StepKind.FORECAST


def step_kinds(num_steps: int, settings: PruneSettings) -> list[StepKind]:
    """The kinds of the steps 0 … num_steps - 1, as totals of an image need them."""
    return [step_kind(number, settings) for number in range(num_steps)]


def scheduled_step(number: int, timesteps: Sequence[float], settings: PruneSettings) -> ScheduledStep:
    """The row of a step.

    Args:
        number: of the step, 0-based.
        timesteps: of the steps 0 … number; read by the rule only.
        settings: what to compute.

    Raises:
        ScheduleError: the schedule has no such step.
    """
    kind = step_kind(number, settings)
    if settings.schedule is not None:
        return settings.schedule.steps[number]
    if kind is StepKind.FULL:
        return FULL_STEP
    weights = _line(number, timesteps, settings) if settings.reuse is Reuse.EXTRAPOLATE else {}
    return ScheduledStep(kind=kind, weights=weights)


def at_timesteps(settings: PruneSettings, timesteps: Sequence[float], precision: float = 0.0) -> PruneSettings:
    """The settings of an image at these timesteps: as they are if their schedule has them, else with one moved there.

    Args:
        settings: what to compute.
        timesteps: of the whole run, even if the image begins late in it; none where they are not known in advance.
        precision: machine epsilon of the dtype that they came in.

    Raises:
        ScheduleError: the schedule neither has them nor can be moved to them (`moved_schedule.can_move`).
    """
    table = settings.schedule
    if table is None:
        return settings
    try:
        table.check_timesteps(timesteps, precision)
    except ScheduleError:
        levels = tuple(level for level, _ in itertools.groupby(timesteps))
        if not can_move(table, levels):
            raise
        return settings.replace(schedule=move(table, levels))
    return settings


@functools.lru_cache(maxsize=64)
def begun_late(settings: PruneSettings, steps_left: int) -> PruneSettings:
    """The settings of an image that begins late in its schedule, as image-to-image does: the forecast by rule.

    A schedule is fitted to whole runs. What its later rows read was never computed in such an image; as full steps they
    would cost nearly as much as a full run, and the rule is nearer to that at the same cost (`benchmarks/transfer.py`).
    The share of full steps is the schedule's, and two more, which a beginning takes. As in the preset `forecast` four
    of them come first, or two where there are fewer than seven.

    Args:
        settings: with a schedule.
        steps_left: how many steps the image has.
    """
    assert settings.schedule is not None
    rule = PRESETS[Preset.FORECAST]
    budget = 2 + round(steps_left * len(settings.schedule.full_steps) / settings.schedule.num_steps)
    fewest = rule["full_steps"] if budget >= rule["full_steps"] + 3 else 2
    possible = [
        settings.replace(**{**rule, "schedule": None, "full_steps": first, "refresh_every": every})
        for first in range(fewest, budget + 1)
        for every in range(2, max(3, steps_left))
    ]
    return min(possible, key=lambda each: abs(step_kinds(steps_left, each).count(StepKind.FULL) - budget))


def last_read(number: int, settings: PruneSettings) -> float:
    """The last step that reads the output of a full step; the step itself if none does.

    By rule, steps read the last two full ones; so the second full step after it is the first that does not.
    """
    if settings.schedule is not None:
        return settings.schedule.last_read.get(number, number)
    if settings.reuse is Reuse.REPEAT:
        return number
    if not settings.refresh_every and number + 2 >= settings.full_steps:
        return math.inf
    later = (step for step in itertools.count(number + 1) if step_kind(step, settings) is StepKind.FULL)
    return next(itertools.islice(later, 1, None)) - 1


def reference_step(settings: PruneSettings) -> int:
    """t0, whose noise is the reference of the relative noise: the last but one of the full steps at the start."""
    if settings.schedule is None:
        return settings.full_steps - 2
    kinds = [step.kind for step in settings.schedule.steps]
    first = next((number for number, kind in enumerate(kinds) if kind is not StepKind.FULL), len(kinds))
    return max(0, first - 2)


def _is_refresh(number: int, settings: PruneSettings) -> bool:
    every = settings.refresh_every
    return bool(every) and (number - settings.full_steps + 1 + every // 2) % every == 0


def _line(number: int, timesteps: Sequence[float], settings: PruneSettings) -> dict[int, float]:
    """The weights of the line through the last two full steps before a step: v₂ + (t - t₂) · (v₂ - v₁) / (t₂ - t₁)."""
    full = [before for before in range(number) if step_kind(before, settings) is StepKind.FULL]
    first, last = full[-2:]
    beyond = (timesteps[number] - timesteps[last]) / (timesteps[last] - timesteps[first])
    return {first: -beyond, last: 1.0 + beyond}
