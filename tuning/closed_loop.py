"""Schedules run and fitted with the model itself: every full step sees the latents that the schedule has led to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.tuning.fit import RIDGE
from cat_pruning.tuning.recordings import Recordings
from cat_pruning.tuning.weights import Weights, checked_full_steps, checked_terms, intervals, weight_matrix, weight_rows

Model = Callable[[int, Tensor], Tensor]
"""(step, latents (R, …)) → what the scheduler gets on that step: after guidance, of the latents' shape."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClosedLoopFit:
    """What `fit_closed_loop` found.

    Attributes:
        weights: of the steps that are not full.
        errors: ‖x̂_n − x_n‖ / ‖x_n‖ of each run that they were fitted to: (R,) float64.
    """

    weights: Weights
    errors: Tensor


def run_closed_loop(
    model: Model, start: Tensor, matrix: Tensor, full_steps: Iterable[int], weights: Mapping[int, Mapping[int, float]]
) -> Tensor:
    """The final latents of runs of a schedule.

    Args:
        model: evaluated on the full steps alone.
        start: x_0, (R, …).
        matrix: of `cat_pruning.tuning.scheduler_matrix`.
        full_steps: numbers, 0 among them.
        weights: of the other steps.

    Raises:
        SettingsError: full steps outside their range.
    """
    run = _Run(start, matrix)
    steps = checked_full_steps(full_steps, run.num_steps)
    run.weights = weight_matrix(steps, weights, run.num_steps)
    for step in steps:
        run.outputs[step] = model(step, run.state(step))
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
    terms, run = checked_terms(terms), _Run(recordings.start, matrix)
    if run.num_steps != recordings.num_steps:
        raise SettingsError(f"recordings of {recordings.num_steps} steps, a scheduler of {run.num_steps}")
    if recordings.start.numel() < terms:
        raise SettingsError(
            f"recordings of {recordings.start.numel()} numbers: expected {terms} or more", "record more runs"
        )
    steps = checked_full_steps(full_steps, run.num_steps)
    for position, (step, following) in enumerate(intervals(steps, run.num_steps)):
        output = model(step, run.state(step))
        if not bool(torch.isfinite(output).all()):
            raise SettingsError(f"the model's output on step {step} is not finite", "record and fit in float32")
        run.outputs[step] = output
        run.weights[step, step] = 1.0
        if following > step + 1:
            read = steps[max(0, position + 1 - terms) : position + 1]
            skipped = list(range(step + 1, following))
            run.weights[torch.tensor(skipped)[:, None], torch.tensor(read)] = _fit_interval(
                run, recordings, read, skipped, following, ridge
            )
    final = run.state(run.num_steps)
    errors = (final - recordings.final).flatten(1).double().norm(dim=1) / recordings.norms
    return ClosedLoopFit(weights=weight_rows(steps, run.weights, terms), errors=errors.cpu())


class _Run:
    """Runs in progress: the outputs of the full steps so far, and the weights of all steps so far."""

    def __init__(self, start: Tensor, matrix: Tensor) -> None:
        self.num_steps = len(matrix) - 1
        self.start, self.matrix = start, matrix
        self.outputs: dict[int, Tensor] = {}
        self.weights = torch.zeros(self.num_steps, self.num_steps, dtype=torch.float64)

    def state(self, step: int) -> Tensor:
        """x̂_step: (R, …), of the weights that there are; a step that has none yet adds nothing."""
        factors = self.matrix[step, 1:] @ self.weights
        state = float(self.matrix[step, 0]) * self.start
        for read, output in self.outputs.items():
            state = state + float(factors[read]) * output
        return state


def _fit_interval(
    run: _Run, recordings: Recordings, read: tuple[int, ...], skipped: list[int], following: int, ridge: float
) -> Tensor:
    """The weights of the steps between two full steps: (steps, m) float64."""
    missing = recordings.states(run.matrix, following) - run.state(following)  # what the forecasts have to add up to
    basis = [run.outputs[step] for step in read]
    products = torch.zeros(len(read), len(read) + len(skipped) + 1, dtype=torch.float64)
    for index, norm in enumerate(recordings.norms.tolist()):
        outputs = torch.stack([output[index] for output in basis]).flatten(1).double() / norm
        targets = torch.cat([recordings.outputs[index, skipped], missing[index, None]]).flatten(1).double() / norm
        products += (outputs @ torch.cat([outputs, targets]).T).cpu()
    normal, right = products[:, : len(read)], products[:, len(read) :]
    normal = normal + ridge * normal.diagonal().mean() * torch.eye(len(read), dtype=torch.float64)
    own: Tensor = torch.linalg.solve(normal, right[:, :-1]).T  # (steps, m)
    c = run.matrix[following, [step + 1 for step in skipped]]
    shift = torch.linalg.solve(normal, right[:, -1] - products[:, : len(read)] @ (c @ own))
    return own + torch.outer(c / (c @ c).clamp_min(torch.finfo(torch.float64).tiny), shift)
