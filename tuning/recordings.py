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
        outputs: v_i, (R, n, …), what the scheduler got on each step: after guidance.
        final: x_n, (R, …), the latents at the end.

    Raises:
        SettingsError: there is no run, the shapes do not fit, or a number is not finite.
    """

    start: Tensor
    outputs: Tensor
    final: Tensor

    def __post_init__(self) -> None:
        start, outputs = tuple(self.start.shape), tuple(self.outputs.shape)
        if not start or start[0] == 0:
            raise SettingsError("there are no recordings", "record at least one run")
        if len(outputs) < 2 or outputs[1] == 0 or (outputs[0], *outputs[2:]) != start or self.final.shape != start:
            raise SettingsError(
                f"outputs {outputs} and final latents {tuple(self.final.shape)} of a start {start}: expected "
                f"({start[0]}, steps, …) and {start}"
            )
        finite = [torch.isfinite(part.flatten(1)).all(dim=1) for part in (self.start, self.outputs, self.final)]
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
        shapes = {tuple(part.outputs.shape[1:]) for part in parts}
        if len(shapes) != 1:
            raise SettingsError(f"recordings of {len(shapes)} shapes {sorted(shapes)}", "record all runs alike")
        return cls(
            start=torch.cat([part.start for part in parts]),
            outputs=torch.cat([part.outputs for part in parts]),
            final=torch.cat([part.final for part in parts]),
        )

    @property
    def count(self) -> int:
        """R."""
        return len(self.start)

    @property
    def num_steps(self) -> int:
        """N."""
        return self.outputs.shape[1]

    @cached_property
    def norms(self) -> Tensor:
        """‖x_n‖ of every run: (R,) float64, on the recordings' device."""
        return self._norms()

    def some(self, indices: Sequence[int] | slice) -> Recordings:
        """The runs with these numbers."""
        return Recordings(start=self.start[indices], outputs=self.outputs[indices], final=self.final[indices])

    def grams(self) -> Tensor:
        """The inner products of x_0 and the outputs, divided by ‖x_n‖²: (R, n + 1, n + 1) float64 on the CPU.

        With G = `grams()[r]`, a combination b of x_0 and the outputs has the squared norm bᵀ G b, relative to the final
        latents. One run at a time is in float64.
        """
        return torch.stack([_gram(self.start[run], self.outputs[run], self.norms[run]) for run in range(self.count)])

    def states(self, matrix: Tensor, step: int) -> Tensor:
        """x_step of every run, by the scheduler's matrix: (R, …) in the recordings' dtype.

        Args:
            matrix: of `scheduler_matrix`.
            step: 0 … n.
        """
        row = matrix[step].to(self.start)
        summed: Tensor = torch.tensordot(row[1 : step + 1], self.outputs[:, :step], dims=([0], [1]))
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


def _gram(start: Tensor, outputs: Tensor, norm: Tensor) -> Tensor:
    rows = torch.cat([start[None], outputs]).flatten(1).double() / norm
    return (rows @ rows.T).cpu()
