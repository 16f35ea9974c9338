"""What a token contributes to the noise prediction on a step that does not compute it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cat_pruning.families.family import Family


class Extrapolation:
    """The line through a token's last two computed outputs, instead of the last one repeated.

    With v₁ at timestep t₁ and v₂ at t₂ the two, a token that is not computed at t contributes
    v₂ + (t − t₂) · (v₂ − v₁) / (t₂ − t₁): a first-order forecast along the noise level, as TaylorSeer makes for
    features (Liu et al. 2025, arXiv 2503.06923), here for the output alone. It costs a few elementwise operations on
    something of the size of the latents.

    Args:
        family, config: of the model.
    """

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self._family, self._config = family, config
        self.reset()

    def reset(self) -> None:
        """Forget the image."""
        self._computed: Tensor | None = None  # the last computed outputs
        self._slope: Tensor | None = None  # their change per timestep
        self._timestep: Tensor | None = None  # when each was computed, one value a token

    def __call__(self, noise: Tensor, timestep: float, keep_indices: Tensor) -> Tensor:
        """The prediction of a step.

        Args:
            noise: the step's output, every token as it was last computed; in the transformer's layout.
            timestep: of the step.
            keep_indices: (B, n), what the step computed.

        Returns:
            Of `noise`'s shape and dtype. Does not synchronise.
        """
        values = noise.float()
        if self._computed is None or self._slope is None or self._timestep is None:
            self._computed = values
            self._slope = torch.zeros_like(values)
            self._timestep = torch.full_like(self._spread(keep_indices, noise), timestep)
            return noise
        is_new = self._spread(keep_indices, noise)
        elapsed = timestep - self._timestep
        # A scheduler of second order computes twice at one timestep, which says nothing of the slope.
        moves = is_new.bool() & (elapsed != 0.0)
        change = (values - self._computed) / torch.where(elapsed == 0.0, 1.0, elapsed)
        self._slope = torch.where(moves, change, self._slope)
        self._timestep = torch.where(is_new.bool(), timestep, self._timestep)
        self._computed = values
        return (values + self._slope * (timestep - self._timestep)).to(noise.dtype)

    def _spread(self, keep_indices: Tensor, noise: Tensor) -> Tensor:
        """1 where the output is of a computed token, else 0; fp32, with `noise` broadcastable."""
        return self._family.token_mask(keep_indices, noise, self._config)
