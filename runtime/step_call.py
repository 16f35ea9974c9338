"""One call of the transformer, as a pipeline or a loop makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StepCall:
    """What a call passes.

    Attributes:
        latents: the transformer's `hidden_states`, in the caller's dtype, wherever they are.
        timestep: (B,) or scalar, all entries alike.
        arguments: the family's arguments by diffusers' names, alike on every step of an image.
        residuals: a ControlNet's, of this step: see `Family.residuals`.
        skip_layers: blocks that the call leaves out.
    """

    latents: Tensor
    timestep: Tensor
    arguments: Mapping[str, Tensor]
    residuals: Sequence[Tensor | None] = ()
    skip_layers: tuple[int, ...] = ()
