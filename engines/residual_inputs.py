"""A ControlNet's residuals in the memory of a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from cat_pruning.errors import ShapeError
from cat_pruning.step_io import is_residual, residual_names


class ResidualInputs:
    """Buffers for what a ControlNet adds on each step, which stay where they are, so that a captured step reads them.

    Attributes:
        places: the buffer that each block's residual is in, of the last step; None where it has none. A captured step
            is for one such tuple.
    """

    def __init__(self) -> None:
        self.places: tuple[int | None, ...] = ()
        self._buffers: list[Tensor] = []
        self._zeros: Tensor | None = None

    def take(
        self,
        residuals: Sequence[Tensor | None],
        inputs: dict[str, Tensor],
        needed: Sequence[str],
        allocate: Callable[[], Tensor],
    ) -> None:
        """Copy a step's residuals, those that several blocks share once, and name them among the inputs of the model.

        Args:
            residuals: see `Family.residuals`.
            inputs: of the session; get the residuals that there are, and lose those of an earlier step.
            needed: the residuals that the step reads in any case: zeros where there are none.
            allocate: makes a buffer of zeros, (B, N, D).

        Raises:
            ShapeError: a residual has another shape.
        """
        distinct = {id(each): each for each in residuals if each is not None}
        order = {key: place for place, key in enumerate(distinct)}
        while len(self._buffers) < len(distinct):
            self._buffers.append(allocate())
        for buffer, tensor in zip(self._buffers, distinct.values(), strict=False):
            rows, *sizes = tensor.shape
            if sizes != list(buffer.shape[1:]) or rows not in (1, buffer.shape[0]):
                raise ShapeError(
                    f"a ControlNet's residual has shape {tuple(tensor.shape)}, expected {tuple(buffer.shape)}: a row "
                    "for every image token",
                    "take a ControlNet that was made for this transformer",
                )
            buffer.copy_(tensor)
        for name in [name for name in inputs if is_residual(name)]:
            del inputs[name]
        self.places = tuple(None if each is None else order[id(each)] for each in residuals)
        for name, place in zip(residual_names(len(residuals)), self.places, strict=True):
            if place is not None:
                inputs[name] = self._buffers[place]
        for name in needed:
            if name not in inputs:
                self._zeros = allocate() if self._zeros is None else self._zeros
                inputs[name] = self._zeros
