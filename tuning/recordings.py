"""Recorded runs of the full model: what weights and full steps are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.tuning.scheduler_matrix import TOLERANCE


@dataclass(frozen=True, kw_only=True, eq=False)
class Recordings:
    """R runs of n full steps each.

    Attributes:
        start: x_0, (R, …), the noise that a run starts from.
        parts: (R, n, Q, …), on each step the parts whose sum v_i the scheduler got: one, or of `guided_parts` two.
        final: x_n, (R, …), the latents at the end.

    Raises:
        SettingsError: there is no run, the shapes do not fit, or a number is not finite.
    """

    start: Tensor
    parts: Tensor
    final: Tensor

    def __post_init__(self) -> None:
        start, parts = tuple(self.start.shape), tuple(self.parts.shape)
        if not start or start[0] == 0:
            raise SettingsError("there are no recordings", "record at least one run")
        if len(parts) < 3 or 0 in parts[1:3] or (parts[0], *parts[3:]) != start or self.final.shape != start:
            raise SettingsError(
                f"outputs {parts} and final latents {tuple(self.final.shape)} of a start {start}: expected "
                f"({start[0]}, steps, parts, …) and {start}"
            )
        finite = [torch.isfinite(part.flatten(1)).all(dim=1) for part in (self.start, self.parts, self.final)]
        if bad := torch.nonzero(~torch.stack(finite).all(dim=0)).flatten().tolist():
            raise SettingsError(f"recordings {bad} have infinities or NaNs", "leave them out, or record in float32")
        if empty := torch.nonzero(self._norms() == 0).flatten().tolist():
            raise SettingsError(f"recordings {empty} end in zeros, which no error is relative to", "leave them out")

    @classmethod
    def joined(cls, parts: Sequence[Recordings]) -> Self:
        """The runs of all parts.

        Raises:
            SettingsError: there is none, or they differ in steps or shape.
        """
        shapes = {tuple(part.parts.shape[1:]) for part in parts}
        if len(shapes) != 1:
            raise SettingsError(f"recordings of {len(shapes)} shapes {sorted(shapes)}", "record all runs alike")
        return cls(
            start=torch.cat([part.start for part in parts]),
            parts=torch.cat([part.parts for part in parts]),
            final=torch.cat([part.final for part in parts]),
        )

    @property
    def count(self) -> int:
        """R."""
        return len(self.start)

    @property
    def num_steps(self) -> int:
        """N."""
        return self.parts.shape[1]

    @property
    def num_parts(self) -> int:
        """Q."""
        return self.parts.shape[2]

    @cached_property
    def norms(self) -> Tensor:
        """‖x_n‖ of every run: (R,) float64, on the recordings' device."""
        return self._norms()

    def some(self, indices: Sequence[int] | slice) -> Recordings:
        """The runs with these numbers."""
        return Recordings(start=self.start[indices], parts=self.parts[indices], final=self.final[indices])

    def grams(self) -> Tensor:
        """The inner products of x_0 and the parts of all outputs, divided by ‖x_n‖²: (R, 1 + n Q, 1 + n Q) float64.

        With G = `grams()[r]`, a combination b of x_0 and the parts has the squared norm bᵀ G b, relative to the final
        latents. Row 1 + i Q + q is of part q of step i. On the CPU; one run at a time is in float64.
        """
        return torch.stack([_gram(self.start[run], self.parts[run], self.norms[run]) for run in range(self.count)])

    def states(self, matrix: Tensor, step: int) -> Tensor:
        """x_step of every run, by the scheduler's matrix: (R, …) in the recordings' dtype.

        Args:
            matrix: of `scheduler_matrix`.
            step: 0 … n.
        """
        row = matrix[step].to(self.start)
        summed: Tensor = torch.tensordot(row[1 : step + 1], self.parts[:, :step].sum(2), dims=([0], [1]))
        return row[0] * self.start + summed

    def check(self, matrix: Tensor, tolerance: float = TOLERANCE) -> None:
        """Check that the scheduler's matrix leads from the recorded noise and outputs to the recorded final latents.

        Args:
            matrix: of `scheduler_matrix`.
            tolerance: of the relative error.

        Raises:
            SettingsError: it does not: the runs were of another scheduler or other timesteps, or changed on the way.
        """
        if len(matrix) != self.num_steps + 1:
            raise SettingsError(f"recordings of {self.num_steps} steps, a scheduler of {len(matrix) - 1}")
        off = (self.states(matrix, self.num_steps) - self.final).flatten(1).double().norm(dim=1) / self.norms
        if not float(off.max()) <= tolerance:
            raise SettingsError(
                f"the scheduler does not lead to what was recorded (run {int(off.argmax())} is off by {off.max():.1e}, "
                f"at most {tolerance:.0e} was expected)",
                "record with the same scheduler, timesteps and no callback that changes the latents",
            )

    def _norms(self) -> Tensor:
        norms: Tensor = self.final.flatten(1).double().norm(dim=1)
        return norms


def guided_parts(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """The parts of what guidance makes of two rows, v = (1 − g) · negative + g · positive: two tensors in dimension 1.

    Args:
        negative: (R, …), of the unconditional or negative prompt.
        positive: (R, …), of the prompt.
        scale: g, the guidance scale.

    Returns:
        (R, 2, …).
    """
    return torch.stack([(1 - scale) * negative, scale * positive], dim=1)


def _gram(start: Tensor, parts: Tensor, norm: Tensor) -> Tensor:
    rows = torch.cat([start[None], parts.flatten(0, 1)]).flatten(1).double() / norm
    return (rows @ rows.T).cpu()
