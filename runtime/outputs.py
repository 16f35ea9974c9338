"""The outputs of an image's steps, and what a step contributes where it does not compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cat_pruning.families.family import Family
from cat_pruning.schedule import ScheduledStep, StepKind


class History:
    """Outputs of an image's steps, each a tensor or a structure of tensors, for as long as later steps read them."""

    def __init__(self) -> None:
        self._outputs: dict[int, Any] = {}
        self._last_read: dict[int, float] = {}

    def reset(self) -> None:
        """Forget the image."""
        self._outputs.clear()
        self._last_read.clear()

    def has(self, step: ScheduledStep) -> bool:
        """Whether every output that a step reads is there; not so in an image that began late in its schedule."""
        return step.weights.keys() <= self._outputs.keys()

    def keep(self, number: int, output: Any, last_read: float) -> None:
        """Remember the output of a step that computed something, and forget what no later step reads.

        Args:
            number: of the step.
            output: is kept, not copied.
            last_read: the last step that reads it.
        """
        self._outputs[number], self._last_read[number] = output, last_read
        for old in [old for old, last in self._last_read.items() if last <= number]:
            del self._outputs[old], self._last_read[old]

    def combined(self, weights: Mapping[int, float]) -> Any:
        """Σ_j weights[j] · outputs[j], tensor by tensor, each in its own dtype. Does not synchronise."""
        read = [self._outputs[number] for number in weights]
        return mapped(lambda *tensors: combine(tensors, list(weights.values())), *read)


class Outputs(History):
    """The predictions that later steps read: see `cat_pruning.schedule` for what is made of them.

    Args:
        family: of the model.
    """

    def __init__(self, family: Family) -> None:
        super().__init__()
        self._family = family

    def take_rows(self, rows: slice) -> None:
        """Go on with some rows of the batch."""
        self._outputs = {number: output[rows] for number, output in self._outputs.items()}

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
        combined: Tensor = self.combined(step.weights)
        if step.negative and negative is not None:
            rows = negative.view(-1, *[1] * (noise.dim() - 1))
            combined = torch.where(rows, self.combined(step.negative), combined)
        if step.kind is StepKind.FORECAST or not keep_indices.shape[1]:
            return combined
        return torch.where(self._family.token_mask(keep_indices, noise).bool(), noise, combined)


def combine(outputs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_j weights[j] · outputs[j], summed in fp32; new memory, of the outputs' dtype. An operation for each of them."""
    total = outputs[0].float() * weights[0]
    for output, weight in zip(outputs[1:], weights[1:], strict=True):
        total.add_(output, alpha=weight)
    return total.to(outputs[0].dtype)


def mapped(function: Callable[..., Tensor], *structures: Any) -> Any:
    """A structure like the first, of a function's values on the tensors that are at the same place in all of them.

    Args:
        function: of as many tensors as there are structures.
        structures: tensors, or lists, tuples or diffusers' outputs (mappings) of them. What else they hold is taken
            from the first.
    """
    first = structures[0]
    if isinstance(first, Tensor):
        return function(*structures)
    if isinstance(first, Mapping):
        return type(first)(**{name: mapped(function, *[each[name] for each in structures]) for name in first})
    if isinstance(first, list | tuple):
        return type(first)([mapped(function, *each) for each in zip(*structures, strict=True)])
    return first
