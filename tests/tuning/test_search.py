from __future__ import annotations

import itertools

import odes
import pytest
import torch

from cat_pruning.errors import SettingsError
from cat_pruning.tuning.fit import Target, fit_choices
from cat_pruning.tuning.search import NOISE, Objective, contenders, search, search_several


def problem(steps: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return odes.recorded(odes.nonlinear(steps, seed=seed), steps, runs=4).grams().mean(0), odes.euler_matrix(steps)


@pytest.mark.parametrize("objective", Objective)
def test_the_best_of_all_choices_is_found(objective: Objective) -> None:
    gram, matrix = problem(8)
    for budget in (3, 4, 5):
        choices = [(0, *rest) for rest in itertools.combinations(range(1, 8), budget - 1)]
        target = Target.STEPS if objective is Objective.STEPS else Target.STATES
        fits = fit_choices(gram, matrix, torch.tensor(choices), terms=2, target=target, ridge=NOISE)
        losses = {
            Objective.END: fits.state_errors[:, -1],
            Objective.STATES: fits.state_errors.sum(1),
            Objective.BOTH: fits.state_errors[:, -1] + fits.state_errors.mean(1),
            Objective.STEPS: fits.step_errors,
        }[objective]
        found = search(gram, matrix, [budget], terms=2, objective=objective, width=3)
        assert found == {budget: choices[int(losses.argmin())]}


def test_budgets_are_searched_in_one_go_and_alike_each_time() -> None:
    gram, matrix = problem(12)
    together = search(gram, matrix, (4, 7, 12))
    assert list(together) == [12, 7, 4]
    assert together[12] == tuple(range(12))
    assert search(gram, matrix, (4,))[4] == together[4]
    assert search(gram, matrix, (4, 7, 12)) == together


def test_several_choices_are_distinct_and_the_best_is_first() -> None:
    gram, matrix = problem(12)
    several = search_several(gram, matrix, (5,), objective=Objective.END, width=4)[5]
    assert len(set(several)) == len(several) == 4
    assert several[0] == search(gram, matrix, (5,), objective=Objective.END, width=4)[5]
    errors = [
        float(fit_choices(gram, matrix, torch.tensor([choice]), ridge=NOISE).state_errors[0, -1]) for choice in several
    ]
    assert errors == sorted(errors)
    apart = search_several(gram, matrix, (5,), width=4, distance=2)[5]
    assert all(len(set(a) - set(b)) >= 2 for a, b in itertools.combinations(apart, 2))


def test_contenders_are_the_best_by_every_objective() -> None:
    gram, matrix = problem(12)
    found = contenders(gram, matrix, (4, 6, 12), count=8)
    assert list(found) == [12, 6, 4]
    assert found[12] == [tuple(range(12))]
    for budget in (4, 6):
        assert 4 <= len(set(found[budget])) == len(found[budget]) <= 8
        for objective in Objective:
            best = search(gram, matrix, (4, 6, 12), objective=objective, width=2)[budget]
            assert best in found[budget]
    assert contenders(gram, matrix, (4,), count=1)[4] == [search(gram, matrix, (4,))[4]]


@pytest.mark.parametrize("budgets", [(), (1,), (3, 9), (0,)])
def test_a_budget_outside_the_steps_is_refused(budgets: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="of 8 steps: expected numbers of full steps from 2 to 8"):
        search(*problem(8), budgets)


def test_a_search_keeps_one_choice_at_least() -> None:
    with pytest.raises(SettingsError, match="width=0"):
        search(*problem(8), [3], width=0)
