"""Weights of the steps that are not full: as a schedule holds them, and as a matrix.

An output has Q parts whose sum is what the scheduler gets: one, or with guidance v = (1 − g) · negative + g · positive
two, the rows that the model computes. Each part has weights of its own.
"""

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


def whole(num_steps: int, num_parts: int) -> Tensor:
    """The outputs as sums of their parts, W of a run whose steps are all full: (n, n Q) float64."""
    return torch.eye(num_steps, dtype=torch.float64).repeat_interleave(num_parts, dim=1)


def weight_matrix(
    full_steps: Iterable[int], weights: Sequence[Mapping[int, Mapping[int, float]]], num_steps: int
) -> Tensor:
    """W of v̂ = W u, u the parts of all outputs, step by step: row i has the weights of step i.

    Args:
        full_steps: their rows have ones in their own places.
        weights: of each part.
        num_steps: n.

    Returns:
        (n, n Q) float64; column j Q + q is of part q of step j.
    """
    parts = len(weights)
    matrix = torch.zeros(num_steps, num_steps, parts, dtype=torch.float64)
    for step in full_steps:
        matrix[step, step] = 1.0
    for part, rows in enumerate(weights):
        for step, row in rows.items():
            for read, weight in row.items():
                matrix[step, read, part] = weight
    return matrix.flatten(1)


def weight_rows(full_steps: Sequence[int], matrix: Tensor, terms: int) -> tuple[Weights, ...]:
    """The inverse of `weight_matrix`: rows that read the last `terms` full steps before them."""
    steps = len(matrix)
    by_part = matrix.view(steps, steps, -1)
    found: list[Weights] = [{} for _ in range(by_part.shape[-1])]
    for position, (step, following) in enumerate(intervals(full_steps, steps)):
        read = full_steps[max(0, position + 1 - terms) : position + 1]
        for skipped in range(step + 1, following):
            for part, rows in enumerate(found):
                rows[skipped] = {j: float(by_part[skipped, j, part]) for j in read}
    return tuple(found)
