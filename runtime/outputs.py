"""The outputs of an image's steps, and what a step contributes where it does not compute."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cat_pruning.families.family import Family
from cat_pruning.schedule import ScheduledStep, StepKind


class Outputs:
    """The predictions that later steps read: see `cat_pruning.schedule` for what is made of them.

    Args:
        family: of the model.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._outputs: dict[int, Tensor] = {}
        self._last_read: dict[int, float] = {}

    def reset(self) -> None:
        """Forget the image."""
        self._outputs.clear()
        self._last_read.clear()

    def has(self, step: ScheduledStep) -> bool:
        """Whether every output that a step reads is there; not so in an image that began late in its schedule."""
        return step.weights.keys() <= self._outputs.keys()

    def of(self, noise: Tensor, step: ScheduledStep, keep_indices: Tensor, negative: Tensor | None = None) -> Tensor:
        """The output of a step. Does not synchronise.

        Args:
            noise: every token as it was last computed, in the transformer's layout.
            step: its row.
            keep_indices: (B, n), the tokens that it computed.
            negative: (B,), whether a row is of a negative prompt; None: none is.

        Returns:
            Of `noise`'s shape and dtype; `noise` itself where it is all that the step is made of.
        """
        if not step.weights:
            return noise
        combined = combine(self._outputs, step.weights)
        if step.negative and negative is not None:
            of_negative = combine(self._outputs, step.negative)
            combined = torch.where(negative.view(-1, *[1] * (noise.dim() - 1)), of_negative, combined)
        combined = combined.to(noise.dtype)
        if step.kind is StepKind.FORECAST or not keep_indices.shape[1]:
            return combined
        return torch.where(self._family.token_mask(keep_indices, noise).bool(), noise, combined)

    def keep(self, number: int, output: Tensor, last_read: float) -> None:
        """Remember the output of a step that computed something, and forget what no later step reads.

        Args:
            number: of the step.
            output: is kept, not copied.
            last_read: the last step that reads it.
        """
        self._outputs[number], self._last_read[number] = output, last_read
        for old in [old for old, last in self._last_read.items() if last <= number]:
            del self._outputs[old], self._last_read[old]


def combine(outputs: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """Σ_j weights[j] · outputs[j] in fp32; new memory. One operation on something of the outputs' size each."""
    (first, weight), *others = weights.items()
    total = outputs[first].float() * weight
    for number, weight in others:
        total.add_(outputs[number], alpha=weight)
    return total
