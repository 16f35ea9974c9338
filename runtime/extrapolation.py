"""What a token contributes to the noise prediction on a step that does not compute it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cat_pruning.families.family import Family


class _Line(NamedTuple):
    """The last computed outputs, their change per timestep, and when each was computed: one value a token."""

    values: Tensor
    slope: Tensor
    timestep: Tensor


class Extrapolation:
    """The line through a token's last two computed outputs, instead of the last one repeated.

    With v₁ at timestep t₁ and v₂ at t₂ the two, a token that is not computed at t contributes
    v₂ + (t − t₂) · (v₂ − v₁) / (t₂ − t₁): a first-order forecast along the noise level, as TaylorSeer makes for
    features (Liu et al. 2025, arXiv 2503.06923), here for the output alone. It costs a few elementwise operations on
    something of the size of the latents.

    Args:
        family: of the model.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self.reset()

    def reset(self) -> None:
        """Forget the image."""
        self._line: _Line | None = None

    def __call__(self, noise: Tensor, timestep: float, keep_indices: Tensor) -> Tensor:
        """The prediction of a step.

        Args:
            noise: the step's output, every token as it was last computed; in the transformer's layout.
            timestep: of the step.
            keep_indices: (B, n), what the step computed.

        Returns:
            Of `noise`'s shape and dtype. Does not synchronise.
        """
        values, is_new = noise.float(), self._spread(keep_indices, noise)
        if self._line is None:
            self._line = _Line(values, torch.zeros_like(values), torch.full_like(is_new, timestep))
            return noise
        line = self._line
        elapsed = timestep - line.timestep
        # A scheduler of second order computes twice at one timestep, which says nothing of the slope.
        moves = is_new.bool() & (elapsed != 0.0)
        change = (values - line.values) / torch.where(elapsed == 0.0, 1.0, elapsed)
        slope = torch.where(moves, change, line.slope)
        at = torch.where(is_new.bool(), timestep, line.timestep)
        self._line = _Line(values, slope, at)
        return (values + slope * (timestep - at)).to(noise.dtype)

    def _spread(self, keep_indices: Tensor, noise: Tensor) -> Tensor:
        """1 where the output is of a computed token, else 0; fp32, with `noise` broadcastable."""
        return self._family.token_mask(keep_indices, noise)
