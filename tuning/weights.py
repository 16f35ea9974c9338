"""Weights of the steps that are not full: as a schedule holds them, and as a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cat_pruning.errors import SettingsError

Weights = dict[int, dict[int, float]]
"""Of every step that is not full: the weights of the outputs of earlier full steps, by the steps' numbers."""


def checked_full_steps(full_steps: Iterable[int], num_steps: int) -> tuple[int, ...]:
    """The numbers of the full steps, ascending.

    Raises:
        SettingsError: the first is not step 0, one is not a step, or one comes twice.
    """
    steps = tuple(sorted(full_steps))
    if not steps or steps[0] != 0 or steps[-1] >= num_steps or len(set(steps)) < len(steps):
        raise SettingsError(
            f"full steps {list(steps)} of {num_steps}: expected 0 and others up to {num_steps - 1}, each once"
        )
    return steps


def checked_terms(terms: int) -> int:
    """How many outputs a forecast reads at most.

    Raises:
        SettingsError: none.
    """
    if terms < 1:
        raise SettingsError(f"terms={terms}: expected at least one earlier output")
    return terms


def intervals(full_steps: Sequence[int], num_steps: int) -> list[tuple[int, int]]:
    """Each full step with the one after it; the last with n, the end."""
    return list(zip(full_steps, [*full_steps[1:], num_steps], strict=True))


def weight_matrix(full_steps: Iterable[int], weights: Mapping[int, Mapping[int, float]], num_steps: int) -> Tensor:
    """W of v̂ = W v: row i has the weights of step i, of a full step a one in its own place.

    Returns:
        (n, n) float64.
    """
    matrix = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    for step in full_steps:
        matrix[step, step] = 1.0
    for step, row in weights.items():
        for read, weight in row.items():
            matrix[step, read] = weight
    return matrix


def weight_rows(full_steps: Sequence[int], matrix: Tensor, terms: int) -> Weights:
    """The inverse of `weight_matrix`: rows that read the last `terms` full steps before them."""
    rows: Weights = {}
    for position, (step, following) in enumerate(intervals(full_steps, len(matrix))):
        read = full_steps[max(0, position + 1 - terms) : position + 1]
        rows.update({skipped: {j: float(matrix[skipped, j]) for j in read} for skipped in range(step + 1, following)})
    return rows
