"""Which steps are full: a search by the error that the recordings predict."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.tuning.fit import Target, fit_choices

NOISE: Final = 3e-4  # ridge of the search, a variance of 1.7 %: outputs of a run are off those of the recordings
_BATCH: Final = 512  # choices that are fitted at once: memory of some 3 · batch · n² Q float64


class Objective(StrEnum):
    """What a choice of full steps is judged by, each forecast fitted to it."""

    END = "end"  # the error of the final latents
    STATES = "states"  # the errors of the latents at the full steps and at the end, squared and summed
    BOTH = "both"  # the end's squared error, and the mean of the states'
    STEPS = "steps"  # the errors of the outputs, squared and summed


def search(
    gram: Tensor,
    matrix: Tensor,
    budgets: Iterable[int],
    *,
    terms: int = 3,
    objective: Objective = Objective.BOTH,
    width: int = 1,
    ridge: float = NOISE,
) -> dict[int, tuple[int, ...]]:
    """The full steps for each budget.

    Starts with all steps and takes one away after the other, of the `width` best choices so far the one that costs
    least; a choice of a wanted size is then improved by moving one full step at a time to where it gains most, until no
    move gains.

    Args:
        gram: mean of `Recordings.grams` over the runs, (1 + n Q, 1 + n Q) float64.
        matrix: of `scheduler_matrix`.
        budgets: numbers of full steps, each from 2 to n.
        terms: as in `fit_weights`.
        objective: what is minimised.
        width: choices that are kept of each size; more find a little better ones, and take longer.
        ridge: as in `fit_weights`; more than there, because a run of the schedule has outputs that differ from the
            recorded ones, which large weights magnify.

    Returns:
        By budget the numbers of the full steps, ascending. Deterministic.

    Raises:
        SettingsError: a budget outside its range, or matrices that do not fit.
    """
    several = search_several(gram, matrix, budgets, terms=terms, objective=objective, width=width, ridge=ridge)
    return {budget: found[0] for budget, found in several.items()}


def search_several(
    gram: Tensor,
    matrix: Tensor,
    budgets: Iterable[int],
    *,
    terms: int = 3,
    objective: Objective = Objective.BOTH,
    width: int = 4,
    distance: int = 1,
    ridge: float = NOISE,
) -> dict[int, list[tuple[int, ...]]]:
    """As `search`, but for each budget the best `width` choices that it came by, the best first; to run and compare.

    Args:
        gram: as in `search`, and so are all others but two.
        matrix: as there.
        budgets: as there.
        terms: as there.
        objective: as there.
        width: choices that are kept of each size on the way, and that are returned.
        distance: full steps that any two of the returned choices differ in, at least.
        ridge: as there.
    """
    steps = len(matrix) - 1
    wanted = _checked(budgets, steps, width)
    judge = _Judge(gram, matrix, terms=terms, objective=objective, ridge=ridge)
    beam = [tuple(range(steps))]
    found = {steps: beam}
    for size in range(steps - 1, min(wanted) - 1, -1):
        smaller = {choice[:at] + choice[at + 1 :] for choice in beam for at in range(1, len(choice))}
        beam = judge.best(smaller, width)
        if size in wanted:
            for choice in beam:
                _improve(choice, steps, judge)
            found[size] = _apart(judge.judged(size), width, distance)
    return {size: found[size] for size in sorted(wanted, reverse=True)}


def contenders(
    gram: Tensor, matrix: Tensor, budgets: Iterable[int], *, count: int = 10, terms: int = 3
) -> dict[int, list[tuple[int, ...]]]:
    """For each budget up to `count` choices of full steps to run: in turn the best, second best, … of every objective.

    No objective ranks choices as their runs do; what is best by one of them is worth a run.

    Args:
        gram: as in `search`.
        matrix: as there.
        budgets: as there.
        count: choices.
        terms: as there.

    Raises:
        SettingsError: as there.
    """
    wanted, each = set(budgets), -(-count // len(Objective))
    by_objective = [
        search_several(gram, matrix, wanted, terms=terms, objective=objective, width=max(1, each), distance=2)
        for objective in (Objective.BOTH, Objective.STEPS, Objective.STATES, Objective.END)
    ]
    found = {}
    for budget in by_objective[0]:
        ranks = itertools.zip_longest(*(several[budget] for several in by_objective))
        distinct = dict.fromkeys(choice for rank in ranks for choice in rank if choice is not None)
        found[budget] = list(distinct)[:count]
    return found


def _apart(choices: Iterable[tuple[int, ...]], count: int, distance: int) -> list[tuple[int, ...]]:
    """The first choices that each differ from all before them in `distance` steps or more."""
    taken: list[tuple[int, ...]] = []
    for choice in choices:
        if all(len(set(choice).difference(other)) >= distance for other in taken):
            taken.append(choice)
        if len(taken) == count:
            break
    return taken


class _Judge:
    """The losses of choices, each computed once."""

    def __init__(self, gram: Tensor, matrix: Tensor, *, terms: int, objective: Objective, ridge: float) -> None:
        self._gram, self._matrix, self._terms = gram, matrix, terms
        self._objective, self._ridge = objective, ridge
        self._losses: dict[tuple[int, ...], float] = {}

    def best(self, choices: Iterable[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
        """The choices with the smallest losses; of equal ones the first in order."""
        known = sorted(choices)
        new = [choice for choice in known if choice not in self._losses]
        for start in range(0, len(new), _BATCH):
            part = new[start : start + _BATCH]
            self._losses.update(zip(part, self._judged(torch.tensor(part)).tolist(), strict=True))
        return sorted(known, key=self._losses.__getitem__)[:count]

    def judged(self, size: int) -> list[tuple[int, ...]]:
        """All choices of a size that were judged, the best first."""
        choices = sorted(choice for choice in self._losses if len(choice) == size)
        return sorted(choices, key=self._losses.__getitem__)

    def loss(self, choice: tuple[int, ...]) -> float:
        """Of a choice that was among those of `best`."""
        return self._losses[choice]

    def _judged(self, choices: Tensor) -> Tensor:
        target = Target.STEPS if self._objective is Objective.STEPS else Target.STATES
        fits = fit_choices(self._gram, self._matrix, choices, terms=self._terms, target=target, ridge=self._ridge)
        match self._objective:
            case Objective.END:
                return fits.state_errors[:, -1]
            case Objective.STATES:
                return fits.state_errors.sum(1)
            case Objective.BOTH:
                return fits.state_errors[:, -1] + fits.state_errors.mean(1)
            case Objective.STEPS:
                return fits.step_errors


def _improve(choice: tuple[int, ...], steps: int, judge: _Judge) -> None:
    """Judge every move of one full step, take the best, and go on from there until none gains."""
    while True:
        moved = {
            tuple(sorted({*choice[:at], *choice[at + 1 :], to}))
            for at in range(1, len(choice))
            for to in set(range(1, steps)).difference(choice)
        }
        best = judge.best(moved, 1)
        if not best or not judge.loss(best[0]) < judge.loss(choice):
            return
        choice = best[0]


def _checked(budgets: Iterable[int], steps: int, width: int) -> set[int]:
    wanted = set(budgets)
    if not wanted or min(wanted) < 2 or max(wanted) > steps:
        raise SettingsError(
            f"budgets {sorted(wanted)} of {steps} steps: expected numbers of full steps from 2 to {steps}"
        )
    if width < 1:
        raise SettingsError(f"width={width}: expected at least one choice")
    return wanted
