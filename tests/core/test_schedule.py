from __future__ import annotations

import pytest

from cat_pruning.schedule import StepKind, schedule, step_kinds
from cat_pruning.settings import PruneSettings


def test_paper_schedule_has_full_steps_at_the_start_only() -> None:
    kinds = step_kinds(28, PruneSettings(full_steps=8))
    assert kinds == [StepKind.FULL] * 8 + [StepKind.PRUNED] * 20


def test_extra_full_steps_are_full_and_leave_the_others_alone() -> None:
    kinds = step_kinds(10, PruneSettings(full_steps=3, extra_full_steps=(5, 9, 40)))
    assert [step for step, kind in enumerate(kinds) if kind is StepKind.FULL] == [0, 1, 2, 5, 9]


def full_steps(num_steps: int, settings: PruneSettings) -> list[int]:
    return [step for step, kind in enumerate(step_kinds(num_steps, settings)) if kind is StepKind.FULL]


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


def test_extra_full_steps_and_refreshes_are_both_full() -> None:
    settings = PruneSettings(full_steps=2, refresh_every=4, extra_full_steps=(4,))
    assert full_steps(9, settings) == [0, 1, 3, 4, 7]


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_an_image_of_fewer_steps_than_full_steps_is_all_full(num_steps: int) -> None:
    assert step_kinds(num_steps, PruneSettings(full_steps=4)) == [StepKind.FULL] * num_steps


def test_step_kinds_agrees_with_schedule() -> None:
    settings = PruneSettings(full_steps=2, extra_full_steps=(4,))
    assert step_kinds(7, settings) == [schedule(step, settings) for step in range(7)]


def test_a_step_after_the_last_planned_one_has_a_kind() -> None:
    assert schedule(10_000, PruneSettings()) is StepKind.PRUNED
