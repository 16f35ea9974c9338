"""From recordings to schedules: the full steps are searched, the weights fitted with the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from cat_pruning.tuning.closed_loop import Model, fit_closed_loop
from cat_pruning.tuning.recordings import Recordings
from cat_pruning.tuning.search import Objective, search_several
from cat_pruning.tuning.weights import Weights

CONTENDERS: Final = 4  # choices of full steps that are run before one is taken
TRIED_ON: Final = 8  # recordings that they are run on


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The full steps and the weights for one budget.

    Attributes:
        full_steps: numbers, ascending.
        weights: of the other steps.
        error: relative error of the final latents, mean over the recordings that it was fitted to.
    """

    full_steps: tuple[int, ...]
    weights: Weights
    error: float


def fit_schedules(
    model: Model,
    recordings: Recordings,
    matrix: Tensor,
    budgets: Sequence[int],
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[int, Fitted]:
    """The best schedule for each number of full steps.

    The recordings' inner products give a few good choices of full steps (`search_several`). Each is fitted and run with
    the model on some of the recordings; the best is fitted to all of them (`fit_closed_loop`).

    Args:
        model: that made the recordings.
        recordings: runs of the full model.
        matrix: of the scheduler.
        budgets: numbers of full steps.
        advance: called with the number of steps of one run that were computed.

    Raises:
        SettingsError: a budget is outside its range, or there are too few recordings.
    """
    gram = recordings.grams().mean(0)
    choices = search_several(gram, matrix, budgets, objective=Objective.BOTH, width=CONTENDERS, distance=2)
    some = recordings.some(slice(0, TRIED_ON))

    def error_of(choice: tuple[int, ...]) -> float:
        error = float(fit_closed_loop(model, some, matrix, choice).errors.mean())
        advance(len(choice) * some.count)
        return error

    fitted = {}
    for budget, contenders in choices.items():
        best = min(contenders, key=error_of)
        fit = fit_closed_loop(model, recordings, matrix, best)
        advance(budget * recordings.count)
        fitted[budget] = Fitted(full_steps=best, weights=fit.weights, error=float(fit.errors.mean()))
    return fitted


def steps_of_fits(budgets: Sequence[int], count: int) -> int:
    """The steps of one run each that `fit_schedules` computes at most, for `count` recordings."""
    return sum(budget * (count + CONTENDERS * min(count, TRIED_ON)) for budget in budgets)
