"""Which steps of an image run the full model: one pure function of the step's number."""

from __future__ import annotations

from enum import StrEnum

from cat_pruning.settings import PruneSettings


class StepKind(StrEnum):
    """What one call of the transformer computes."""

    FULL = "full"  # every image token
    PRUNED = "pruned"  # the kept tokens only, or nothing


def schedule(step: int, settings: PruneSettings) -> StepKind:
    """The kind of a step: FULL for step < F, for every `refresh_every`-th after them and for the extra full steps.

    The paper's timeline (Cheng, Chen, Jia 2025, algorithm 2) has F full steps at the start and no
    full step after them; `refresh_every` and `extra_full_steps` are ours. The first refresh comes after half an
    interval, because an image changes most at its start: with F = 4 and every third step, 5, 8, 11, ….

    Args:
        step: number of the step in this image, 0-based.
        settings: `full_steps`, `refresh_every` and `extra_full_steps` are read.
    """
    if step < settings.full_steps or step in settings.extra_full_steps:
        return StepKind.FULL
    every = settings.refresh_every
    if every and (step - settings.full_steps + 1 + every // 2) % every == 0:
        return StepKind.FULL
    return StepKind.PRUNED


def step_kinds(num_steps: int, settings: PruneSettings) -> list[StepKind]:
    """The kinds of the steps 0 … num_steps - 1, as totals of an image need them."""
    return [schedule(step, settings) for step in range(num_steps)]
