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
from cat_pruning.tuning.weights import Weights, checked_full_steps, checked_terms, weight_rows

RIDGE: Final = 1e-7  # of the mean squared norm of what is combined: outputs of steps side by side are nearly the same


class Target(StrEnum):
    """What forecasts are fitted to."""

    STEPS = "steps"  # each step's own output
    STATES = "states"  # the latents at the next full step, and at the end


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fits:
    """The fits of B choices of K full steps.

    Attributes:
        weights: W of v̂ = W v, (B, n, n) float64.
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
) -> Weights:
    """The weights of the steps that are not full, by `fit_choices`.

    Args:
        gram: mean of `Recordings.grams` over the runs, (n + 1, n + 1) float64.
        matrix: of `scheduler_matrix`.
        full_steps: numbers, 0 among them.
        terms: a forecast reads the last so many full steps.
        target: what is fitted.
        ridge: penalty of the weights' squares.

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
    error = matrix[-1, 1:] @ (weights - torch.eye(len(weights), dtype=torch.float64))
    return float((error @ gram[1:, 1:] @ error).clamp_min(0).sqrt())


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

    The steps between the full steps s and s' read the last m full outputs u. Their weights are first those of least
    squares on each step's own output, w_i. Then, for `Target.STATES`, they are moved by as little as makes the latents
    at s' the nearest to the recorded ones: of x̂_s' = base + Σ_i c_i w_i·u, c = C[s', i + 1], only a = Σ_i c_i w_i
    matters, and w_i + c_i (a − Σ_k c_k w_k) / Σ_k c_k² is the nearest to the w_i that has the best a. What an interval
    leaves as an error the next ones correct, as far as their outputs can.

    Args:
        gram: as in `fit_weights`, and so are all others but one.
        matrix: as there.
        full_steps: (B, K) int64, ascending, the first 0.
        terms: as there.
        target: as there.
        ridge: as there.

    Raises:
        SettingsError: matrices of other sizes, or fewer than one term.
    """
    size = len(matrix)
    if gram.shape != (size, size):
        raise SettingsError(f"a Gram matrix {tuple(gram.shape)} for {size - 1} steps: expected {(size, size)}")
    terms, count, steps = checked_terms(terms), len(full_steps), size - 1
    outputs, choices = gram[1:, 1:], torch.arange(count)
    # (B, n, n): what row i's output is of the recorded ones, less the recorded output i; 0 for full steps.
    errors = torch.zeros(count, steps, steps, dtype=torch.float64)
    ends = torch.cat([full_steps, torch.full((count, 1), steps)], dim=1)
    state_errors = []
    for position in range(full_steps.shape[1]):
        read = full_steps[:, max(0, position + 1 - terms) : position + 1]  # (B, m)
        last, following = ends[:, position, None], ends[:, position + 1, None]
        skipped = ((torch.arange(steps) > last) & (torch.arange(steps) < following)).double()  # (B, n)
        coefficients = matrix[following[:, 0], 1:]  # (B, n), C of the next full step's state
        normal = _normal(outputs, read, ridge)
        own = torch.linalg.solve(normal, outputs[read]).mT * skipped[..., None]  # (B, n, m)
        errors -= torch.diag_embed(skipped)
        errors[choices[:, None, None], torch.arange(steps)[None, :, None], read[:, None]] += own
        state = torch.einsum("bi,bij->bj", coefficients, errors)  # (B, n), zero beyond s'
        if target is Target.STATES:
            c = coefficients * skipped
            shift = torch.linalg.solve(normal, (outputs[read] @ state[..., None]))[..., 0]  # (B, m)
            each = c / (c * c).sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            errors[choices[:, None, None], torch.arange(steps)[None, :, None], read[:, None]] -= (
                each[..., None] * shift[:, None]
            )
            state = torch.einsum("bi,bij->bj", coefficients, errors)
        state_errors.append(_squared(state, outputs))
    return Fits(
        weights=errors + torch.eye(steps, dtype=torch.float64),
        state_errors=torch.stack(state_errors, dim=1),
        step_errors=_squared(errors, outputs).sum(1),
    )


def _normal(outputs: Tensor, read: Tensor, ridge: float) -> Tensor:
    """The normal equations' matrices: (B, m, m)."""
    normal = outputs[read[:, :, None], read[:, None, :]]
    return normal + torch.diag_embed(ridge * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(read.shape))


def _squared(vectors: Tensor, gram: Tensor) -> Tensor:
    """The squared norms of combinations: (…, n) → (…)."""
    return ((vectors @ gram) * vectors).sum(-1).clamp_min(0)
