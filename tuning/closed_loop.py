"""Schedules run and fitted with the model itself: every full step sees the latents that the schedule has led to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.tuning.fit import RIDGE
from cat_pruning.tuning.recordings import Recordings
from cat_pruning.tuning.weights import Weights, checked_full_steps, checked_terms, intervals, weight_matrix, weight_rows

Model = Callable[[int, Tensor], Tensor]
"""(step, latents (R, …)) → the parts of the output on that step, (R, Q, …), as recorded."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClosedLoopFit:
    """What `fit_closed_loop` found.

    Attributes:
        full_steps: the numbers of the full steps, ascending.
        weights: of the steps that are not full, for each part of an output.
        errors: ‖x̂_n − x_n‖ / ‖x_n‖ of each run that they were fitted to: (R,) float64.
    """

    full_steps: tuple[int, ...]
    weights: tuple[Weights, ...]
    errors: Tensor


def run_closed_loop(
    model: Model,
    start: Tensor,
    matrix: Tensor,
    full_steps: Iterable[int],
    weights: Sequence[Mapping[int, Mapping[int, float]]],
) -> Tensor:
    """The final latents of runs of a schedule.

    Args:
        model: evaluated on the full steps alone.
        start: x_0, (R, …).
        matrix: of `cat_pruning.tuning.scheduler_matrix`.
        full_steps: numbers, 0 among them.
        weights: of the other steps, for each part of an output.

    Raises:
        SettingsError: full steps outside their range.
    """
    run = _Run(start, matrix, len(weights))
    steps = checked_full_steps(full_steps, run.num_steps)
    run.weights = weight_matrix(steps, weights, run.num_steps).view_as(run.weights)
    for step in steps:
        run.take(step, model(step, run.state(step)))
    return run.state(run.num_steps)


def fit_closed_loop(
    model: Model,
    recordings: Recordings,
    matrix: Tensor,
    full_steps: Iterable[int],
    *,
    terms: int = 3,
    ridge: float = RIDGE,
) -> ClosedLoopFit:
    """Fit the weights while the schedule runs on the recordings' noise.

    At a full step s the model is evaluated at the latents x̂_s that the weights so far have led to. The weights up to
    the next full step s' are then those of least squares of x̂_s' against the recorded x_s', as `fit_choices` has them,
    on the outputs that were evaluated. So they also correct what went wrong before, as far as the outputs span it.
    Takes as many evaluations of the model as there are full steps.

    Args:
        model: that made the recordings.
        recordings: runs of the full model.
        matrix: of `cat_pruning.tuning.scheduler_matrix`.
        full_steps: numbers, 0 among them.
        terms: a forecast reads the last so many full steps.
        ridge: penalty of the weights' squares, in units of the outputs' mean square.

    Raises:
        SettingsError: full steps or terms outside their range, a matrix of another number of steps, fewer equations
            than weights of an interval, or a model whose outputs are not finite.
    """
    return _fit(model, recordings, matrix, full_steps, terms, ridge, known={})


def fit_best(
    model: Model,
    recordings: Recordings,
    matrix: Tensor,
    choices: Iterable[Iterable[int]],
    *,
    terms: int = 3,
    ridge: float = RIDGE,
) -> ClosedLoopFit:
    """Fit several choices of full steps in the loop, and keep the one of the least mean error; of equal ones the first.

    What the recordings alone predict (`cat_pruning.tuning.search`) ranks choices roughly: the best of a few, run on
    some of the recordings, is better than the first. Choices that begin alike share their evaluations of the model.

    Args:
        model: as in `fit_closed_loop`, and so are all others but one.
        recordings: as there.
        matrix: as there.
        choices: of full steps, as of `search_several`.
        terms: as there.
        ridge: as there.

    Raises:
        SettingsError: as there, or there is no choice.
    """
    known: dict[tuple[int, ...], Tensor] = {}
    fits = [_fit(model, recordings, matrix, choice, terms, ridge, known) for choice in choices]
    if not fits:
        raise SettingsError("there is no choice of full steps", "give one, as search_several has them")
    return min(fits, key=lambda fit: float(fit.errors.mean()))


def _fit(
    model: Model,
    recordings: Recordings,
    matrix: Tensor,
    full_steps: Iterable[int],
    terms: int,
    ridge: float,
    known: dict[tuple[int, ...], Tensor],
) -> ClosedLoopFit:
    """`fit_closed_loop`. `known` has the outputs by the full steps up to theirs, and takes those that are new."""
    terms, run = checked_terms(terms), _Run(recordings.start, matrix, recordings.num_parts)
    if run.num_steps != recordings.num_steps:
        raise SettingsError(f"recordings of {recordings.num_steps} steps, a scheduler of {run.num_steps}")
    if recordings.start.numel() < terms * recordings.num_parts:
        raise SettingsError(
            f"recordings of {recordings.start.numel()} numbers for {terms * recordings.num_parts} weights of a step",
            "record more runs, or ask for fewer terms",
        )
    steps = checked_full_steps(full_steps, run.num_steps)
    for position, (step, following) in enumerate(intervals(steps, run.num_steps)):
        so_far = steps[: position + 1]
        if so_far not in known:
            known[so_far] = _finite(model(step, run.state(step)), step)
        run.take(step, known[so_far])
        if following > step + 1:
            read = steps[max(0, position + 1 - terms) : position + 1]
            _fit_interval(run, recordings, read, range(step + 1, following), ridge)
    final = run.state(run.num_steps)
    errors = (final - recordings.final).flatten(1).double().norm(dim=1) / recordings.norms
    return ClosedLoopFit(
        full_steps=steps, weights=weight_rows(steps, run.weights.flatten(1), terms), errors=errors.cpu()
    )


def _finite(parts: Tensor, step: int) -> Tensor:
    if not bool(torch.isfinite(parts).all()):
        raise SettingsError(f"the model's output on step {step} is not finite", "record and fit in float32")
    return parts


class _Run:
    """Runs in progress: the outputs of the full steps so far, and the weights of all steps so far.

    Args:
        start: x_0, (R, …).
        matrix: of the scheduler.
        num_parts: Q.
    """

    def __init__(self, start: Tensor, matrix: Tensor, num_parts: int) -> None:
        self.num_steps = len(matrix) - 1
        self.start, self.matrix = start, matrix
        self.parts: dict[int, Tensor] = {}  # by step (R, Q, …)
        self.weights = torch.zeros(self.num_steps, self.num_steps, num_parts, dtype=torch.float64)

    def take(self, step: int, parts: Tensor) -> None:
        """Go on with what a full step computed."""
        self.parts[step] = parts
        self.weights[step, step] = 1.0

    def state(self, step: int) -> Tensor:
        """x̂_step: (R, …), of the weights that there are; a step that has none yet adds nothing."""
        factors = torch.einsum("i,ijq->jq", self.matrix[step, 1:], self.weights).tolist()
        state = float(self.matrix[step, 0]) * self.start
        for read, parts in self.parts.items():
            for factor, part in zip(factors[read], parts.unbind(1), strict=True):
                state = state + factor * part
        return state


def _fit_interval(run: _Run, recordings: Recordings, read: tuple[int, ...], skipped: range, ridge: float) -> None:
    """Set the weights of the steps between two full steps."""
    steps, following = list(skipped), skipped.stop
    missing = recordings.states(run.matrix, following) - run.state(following)  # what the forecasts have to add up to
    size = len(read) * recordings.num_parts
    products = torch.zeros(size, size + len(steps) + 1, dtype=torch.float64)
    for index, norm in enumerate(recordings.norms.tolist()):  # one run at a time is in float64
        basis = torch.cat([run.parts[step][index] for step in read]).flatten(1).double() / norm  # (m Q, D)
        own = recordings.parts[index, steps].sum(1).flatten(1).double() / norm
        targets = torch.cat([own, missing[index].flatten()[None].double() / norm])
        products += (basis @ torch.cat([basis, targets]).T).cpu()
    normal = products[:, :size] + ridge * products.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    each = torch.linalg.solve(normal, products[:, size:-1]).T  # (steps, m Q)
    c = run.matrix[following, [step + 1 for step in steps]]
    shift = torch.linalg.solve(normal, products[:, -1] - products[:, :size] @ (c @ each))
    each = each + torch.outer(c / (c @ c).clamp_min(torch.finfo(torch.float64).tiny), shift)
    run.weights[torch.tensor(steps)[:, None], torch.tensor(read)] = each.view(len(steps), len(read), -1)
