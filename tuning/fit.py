"""Weights by least squares on recorded runs: what the steps between full steps are made of.

All of it needs the recordings' inner products alone (`Recordings.grams`), n + 1 numbers squared, so that thousands of
choices of full steps are tried in a second. It takes the outputs of the full steps as recorded, though a run of the
schedule evaluates the model at its own latents; `cat_pruning.tuning.closed_loop` does that too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.tuning.weights import Weights, checked_full_steps, checked_terms, weight_rows, whole

RIDGE: Final = 1e-7  # of the mean squared norm of what is combined: outputs of steps side by side are nearly the same


class Target(StrEnum):
    """What forecasts are fitted to."""

    STEPS = "steps"  # each step's own output
    STATES = "states"  # the latents at the next full step, and at the end


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fits:
    """The fits of B choices of K full steps.

    Attributes:
        weights: W of v̂ = W u, u the parts of all outputs, (B, n, n Q) float64; `cat_pruning.tuning.weights`.
        state_errors: squared errors of the latents at the full steps but the first, and at the end, relative to the
            final latents: (B, K).
        step_errors: squared errors of the outputs, summed over the steps, in the same unit: (B,).
    """

    weights: Tensor
    state_errors: Tensor
    step_errors: Tensor


def fit_weights(
    gram: Tensor,
    matrix: Tensor,
    full_steps: Iterable[int],
    *,
    terms: int = 3,
    target: Target = Target.STATES,
    ridge: float = RIDGE,
) -> tuple[Weights, ...]:
    """The weights of the steps that are not full, by `fit_choices`: of each part of an output.

    Args:
        gram: mean of `Recordings.grams` over the runs, (1 + n Q, 1 + n Q) float64.
        matrix: of `scheduler_matrix`.
        full_steps: numbers, 0 among them.
        terms: a forecast reads the last so many full steps.
        target: what is fitted.
        ridge: penalty of the weights' squares, in units of the parts' mean square.

    Raises:
        SettingsError: full steps or terms outside their range, or matrices that do not fit.
    """
    steps = checked_full_steps(full_steps, len(matrix) - 1)
    fits = fit_choices(gram, matrix, torch.tensor([steps]), terms=terms, target=target, ridge=ridge)
    return weight_rows(steps, fits.weights[0], terms)


def predicted_error(gram: Tensor, matrix: Tensor, weights: Tensor) -> float:
    """The relative error of the final latents of a run with these weights, if the full steps' outputs stay as recorded.

    Args:
        gram: mean of `Recordings.grams`.
        matrix: of `scheduler_matrix`.
        weights: of `weight_matrix`.

    Returns:
        √(mean over the runs of ‖x̂_n − x_n‖² / ‖x_n‖²).
    """
    steps, columns = weights.shape
    return float(_squared(matrix[-1, 1:] @ (weights - whole(steps, columns // steps)), gram[1:, 1:]).sqrt())


def fit_choices(
    gram: Tensor,
    matrix: Tensor,
    full_steps: Tensor,
    *,
    terms: int = 3,
    target: Target = Target.STATES,
    ridge: float = RIDGE,
) -> Fits:
    """Fit the weights of many choices of full steps at once.

    The steps between the full steps s and s' read u, the parts of the last m full outputs. Their weights are first
    those of least squares on each step's own output, w_i. Then, for `Target.STATES`, they are moved by as little as
    makes the latents at s' the nearest to the recorded ones: of x̂_s' = base + Σ_i c_i w_i·u, c_i = C[s', i + 1], only
    a = Σ_i c_i w_i matters, and w_i + c_i (a − Σ_k c_k w_k) / Σ_k c_k² is the nearest to the w_i that has the best a.
    What an interval leaves as an error the next ones correct, as far as their outputs can.

    Args:
        gram: as in `fit_weights`, and so are all others but one.
        matrix: as there.
        full_steps: (B, K) int64, ascending, the first 0.
        terms: as there.
        target: as there.
        ridge: as there.

    Raises:
        SettingsError: matrices of sizes that do not fit, or fewer than one term.
    """
    terms, count, steps = checked_terms(terms), len(full_steps), len(matrix) - 1
    parts, products = _num_parts(gram, steps), gram[1:, 1:]
    outputs = whole(steps, parts)  # (n, n Q)
    errors = torch.zeros(count, steps, steps * parts, dtype=torch.float64)  # of the outputs, as sums of parts
    ends = torch.cat([full_steps, torch.full((count, 1), steps)], dim=1)
    columns = (full_steps[..., None] * parts + torch.arange(parts)).flatten(1)  # (B, K Q)
    state_errors = []
    for position in range(full_steps.shape[1]):
        read = columns[:, max(0, position + 1 - terms) * parts : (position + 1) * parts]  # (B, m Q)
        skipped = _between(ends[:, position], ends[:, position + 1], steps)  # (B, n)
        coefficients = matrix[ends[:, position + 1], 1:]  # (B, n), C of the state at the next full step
        normal = _normal(products, read, ridge)
        own = torch.linalg.solve(normal, products[read] @ outputs.T).mT * skipped[..., None]  # (B, n, m Q)
        errors.sub_(skipped[..., None] * outputs).scatter_add_(2, read[:, None].expand_as(own), own)
        state = (coefficients[:, None] @ errors)[:, 0]  # (B, n Q)
        if target is Target.STATES:
            shift = torch.linalg.solve(normal, products[read] @ state[..., None])  # (B, m Q, 1)
            c = coefficients * skipped
            moves = _spread(c)[..., None] * -shift.mT  # (B, n, m Q)
            errors.scatter_add_(2, read[:, None].expand_as(moves), moves)
            state = state.scatter_add(1, read, (c[:, None] @ moves)[:, 0])
        state_errors.append(_squared(state, products))
    return Fits(
        weights=errors + outputs,
        state_errors=torch.stack(state_errors, dim=1),
        step_errors=_squared(errors, products).sum(1),
    )


def _num_parts(gram: Tensor, steps: int) -> int:
    """Q, by the Gram matrix's size."""
    parts, rest = divmod(len(gram) - 1, steps)
    if rest or parts < 1 or gram.shape != (len(gram), len(gram)):
        raise SettingsError(
            f"a Gram matrix {tuple(gram.shape)} for {steps} steps: expected {steps + 1} rows and columns, or "
            f"{2 * steps + 1} with guidance"
        )
    return parts


def _between(last: Tensor, following: Tensor, steps: int) -> Tensor:
    """1 for the steps between two full steps, else 0: (B, n) float64."""
    numbers = torch.arange(steps)
    return ((numbers > last[:, None]) & (numbers < following[:, None])).double()


def _spread(coefficients: Tensor) -> Tensor:
    """C / ‖c‖² of each row, 0 where c is: (B, n)."""
    return coefficients / coefficients.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _normal(products: Tensor, read: Tensor, ridge: float) -> Tensor:
    """The normal equations' matrices: (B, m Q, m Q)."""
    normal = products[read[:, :, None], read[:, None, :]]
    return normal + torch.diag_embed(ridge * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(read.shape))


def _squared(vectors: Tensor, products: Tensor) -> Tensor:
    """The squared norms of combinations: (…, n Q) → (…)."""
    return ((vectors @ products) * vectors).sum(-1).clamp_min(0)
