"""Which steps of an image run the full model: one pure function of the step's number."""

from __future__ import annotations

from enum import StrEnum

from cat_pruning.settings import PruneSettings


class StepKind(StrEnum):
    """What one call of the transformer computes."""

    FULL = "full"  # every image token
    PRUNED = "pruned"  # the kept tokens only


def schedule(step: int, settings: PruneSettings) -> StepKind:
    """The kind of a step: FULL for step < F and for the extra full steps, PRUNED for the rest.

    The paper's timeline (Cheng, Chen, Jia 2025, algorithm 2) has F full steps at the start and no
    full step after them; `extra_full_steps` is ours.

    Args:
        step: number of the step in this image, 0-based.
        settings: `full_steps` and `extra_full_steps` are read.
    """
    is_full = step < settings.full_steps or step in settings.extra_full_steps
    return StepKind.FULL if is_full else StepKind.PRUNED


def step_kinds(num_steps: int, settings: PruneSettings) -> list[StepKind]:
    """The kinds of the steps 0 … num_steps - 1, as totals of an image need them."""
    return [schedule(step, settings) for step in range(num_steps)]
