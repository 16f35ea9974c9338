"""From recordings to schedules: the full steps are searched, the weights fitted with the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from cat_pruning.tuning.closed_loop import ClosedLoopFit, Model, fit_best, fit_closed_loop
from cat_pruning.tuning.recordings import Recordings
from cat_pruning.tuning.search import contenders

MOST_CHOICES: Final = 10  # choices of full steps that are run before one is taken
TRIED_ON: Final = 16  # recordings that they are run on, at least; on 8 a worse choice won at 7 full steps of 28


def fit_schedules(
    model: Model,
    recordings: Recordings,
    matrix: Tensor,
    budgets: Sequence[int],
    batch: int = 1,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[int, ClosedLoopFit]:
    """The best schedule for each number of full steps.

    The recordings' inner products give a few good choices of full steps (`contenders`). Each is fitted and run with
    the model on some of the recordings; the best is fitted to all of them (`fit_closed_loop`).

    Args:
        model: that made the recordings.
        recordings: runs of the full model.
        matrix: of the scheduler.
        budgets: numbers of full steps.
        batch: the model takes so many recordings at once; some of them are a whole number of batches.
        advance: called with the number of steps of one run that were computed.

    Raises:
        SettingsError: a budget is outside its range, or there are too few recordings.
    """

    def counted(step: int, latents: Tensor) -> Tensor:
        parts = model(step, latents)
        advance(len(latents))
        return parts

    gram = recordings.grams().mean(0)
    choices = contenders(gram, matrix, budgets, count=MOST_CHOICES)
    some = recordings.some(slice(0, _tried_on(batch)))
    fits = {}
    for budget, of_budget in choices.items():
        best = fit_best(counted, some, matrix, of_budget)
        fits[budget] = fit_closed_loop(counted, recordings, matrix, best.full_steps)
    return fits


def most_steps(budgets: Sequence[int], count: int, batch: int) -> int:
    """The steps of one run each that `fit_schedules` computes at most, for `count` recordings."""
    return sum(budget * (count + MOST_CHOICES * min(count, _tried_on(batch))) for budget in budgets)


def _tried_on(batch: int) -> int:
    return -(-TRIED_ON // batch) * batch
