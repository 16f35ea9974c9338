"""What holds for all calls of one image, and how a call is known to be of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cat_pruning.engines.host_flag import HostFlag
from cat_pruning.families.family import Family
from cat_pruning.runtime.step_call import StepCall
from cat_pruning.runtime.timesteps import NoiseLevel, version_of
from cat_pruning.step_io import LATENTS


class Image:
    """What holds for all calls of one image: its shapes, and what the pipeline says of it.

    Args:
        family: of the model.
        call: its first one.

        level: of that.

    Attributes:
        level: of its last call.

    Raises:
        ShapeError: the latents do not fit the model.
    """

    def __init__(self, family: Family, call: StepCall, level: NoiseLevel) -> None:
        latents, arguments = call.latents, call.arguments
        self.grid = family.grid(latents, arguments)
        self.dims = family.dims(
            self.grid,
            batch=latents.shape[0],
            text_length=family.argument_text_length(arguments),
            num_kept=0,
            num_references=family.num_references(arguments),
        )
        self.level = level
        self._latents_shape = latents.shape
        self._arguments = {name: Argument(tensor) for name, tensor in arguments.items()}

    @property
    def is_gone(self) -> bool:
        """Whether its tensors are gone, so that no call of it can come."""
        schedule = self.level.schedule
        is_gone = schedule is not None and schedule.is_gone
        return is_gone or any(argument.is_gone for argument in self._arguments.values())

    def is_over(self) -> bool:
        """Whether no step of it will come, as far as is known: its schedule is at its end, or its tensors are gone."""
        return self.level.is_last or self.is_gone

    def is_for(self, latents: Tensor) -> bool:
        """Whether the latents have the image's shape."""
        return latents.shape == self._latents_shape

    def difference(self, call: StepCall, level: NoiseLevel) -> str | None:
        """What tells that a call is not of this image; None: it is.

        A tensor in the memory that it was in is not read. One in other memory is compared where another argument, or
        the schedule, is the one that it was; that synchronises with a GPU at the first time, and later costs a
        comparison whose outcome is seen one call late.
        """
        latents, arguments = call.latents, call.arguments
        if not self.is_for(latents):
            return f"{LATENTS} has shape {tuple(latents.shape)} after {tuple(self._latents_shape)}"
        moved = {name: argument for name, argument in self._arguments.items() if not argument.is_at(arguments[name])}
        is_anchored = len(moved) < len(self._arguments) or None is not level.schedule is self.level.schedule
        for name, argument in moved.items():
            if not is_anchored:
                return f"{name} and all other conditioning is in other memory than at the call before"
            if not argument.is_alike(arguments[name]):
                return f"{name} has other values or another shape than at the call before"
        return None

    def has_values(self, arguments: Mapping[str, Tensor]) -> bool:
        """Whether conditioning is this image's by its values, whatever memory it is in. Synchronises."""
        return all(argument.has_values(arguments[name]) for name, argument in self._arguments.items())

    def rows_of(self, call: StepCall) -> slice | None:
        """Which rows of this image a call is of, where guidance was switched off and others are left out.

        Synchronises with a GPU where the arguments are new memory.
        """
        latents = call.latents
        if latents.shape[1:] != self._latents_shape[1:] or latents.shape[0] >= self._latents_shape[0]:
            return None
        found = {argument.rows_of(call.arguments[name]) for name, argument in self._arguments.items()}
        start = found.pop()
        return slice(start, start + latents.shape[0]) if not found and start is not None else None

    def is_within(self, call: StepCall) -> bool:
        """Whether a call has this image's rows after others, where guidance was switched on. Synchronises."""
        rows, more = self._latents_shape[0], call.latents.shape[0]
        if call.latents.shape[1:] != self._latents_shape[1:] or more <= rows:
            return False
        tails = {name: tensor[-rows:] for name, tensor in call.arguments.items() if tensor.shape[0] == more}
        return tails.keys() == self._arguments.keys() and all(
            self._arguments[name].is_at(tail) or self._arguments[name].is_alike(tail) for name, tail in tails.items()
        )


def every_token(latents: Tensor, num_tokens: int) -> Tensor:
    """The indices of a full step, (B, N) int32."""
    indices = torch.arange(num_tokens, dtype=torch.int32, device=latents.device)
    return indices.expand(latents.shape[0], -1).contiguous()


class Memory:
    """Where a tensor's values are, to tell without reading them whether a later tensor is the same one."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor  # kept alive, so that no other tensor takes its address
        self._version = version_of(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the same memory, seen the same way and not written to since."""
        mine = self._tensor
        return (
            tensor.data_ptr() == mine.data_ptr()
            and tensor.dtype == mine.dtype
            and tensor.shape == mine.shape
            and tensor.stride() == mine.stride()
            and version_of(tensor) == self._version
        )

    def equals(self, tensor: Tensor) -> bool:
        """Whether `tensor` has the same values, read where they are in other memory; false if ours were written to."""
        mine = self._tensor
        return self.holds(tensor) or (
            tensor.data_ptr() != mine.data_ptr()
            and version_of(mine) == self._version
            and (tensor.device, tensor.dtype, tensor.shape) == (mine.device, mine.dtype, mine.shape)
            and torch.equal(tensor, mine)
        )


class Argument:
    """One argument of an image, known again by its memory or, where a pipeline makes it anew, by its values.

    The tensor itself is not kept: when nobody else keeps it either, its image is over. Its values are, as a copy.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._place = _place(tensor)
        self._copy = tensor.detach().clone()
        self._is_made_anew = False  # alike in other memory, by its values
        self._differed = HostFlag()

    @property
    def is_gone(self) -> bool:
        """Whether nobody can pass it any more."""
        return self._storage.expired() and not self._is_made_anew

    def is_at(self, tensor: Tensor) -> bool:
        """Whether `tensor` is in the same memory, seen the same way and not written to since."""
        return self._is_here(tensor) and _place(tensor) == self._place

    def is_alike(self, tensor: Tensor) -> bool:
        """Whether a tensor in other memory has the same values: see `Image.difference`."""
        if tensor.device.type != "cuda" or not self._is_made_anew:
            self._is_made_anew = self.has_values(tensor)
            return self._is_made_anew
        if not self._is_comparable(tensor):
            return False
        differed = self._differed.poll()
        self._differed.send(torch.ne(tensor, self._copy).any())
        return not differed

    def has_values(self, tensor: Tensor) -> bool:
        """Whether a tensor has this one's values. Synchronises."""
        return self._is_comparable(tensor) and torch.equal(tensor, self._copy)

    def _is_comparable(self, tensor: Tensor) -> bool:
        mine = self._copy
        return (tensor.device, tensor.dtype, tensor.shape) == (mine.device, mine.dtype, mine.shape)

    def rows_of(self, tensor: Tensor) -> int | None:
        """The first of its rows that `tensor` has, one after another; None: `tensor` is no part of it."""
        mine, count = self._copy, tensor.shape[0]
        if not 0 < count < mine.shape[0] or tensor.shape[1:] != mine.shape[1:] or tensor.dtype != mine.dtype:
            return None
        offset, (_, _, _, strides, version) = int(tensor.storage_offset()), self._place
        first, beyond = divmod(offset - self._place[0], strides[0] or 1)
        is_here = self._is_here(tensor) and tensor.stride() == strides and version_of(tensor) == version
        if is_here and not beyond and 0 <= first <= mine.shape[0] - count:
            return first
        starts = (mine.shape[0] - count, 0)  # the prompt's rows, which come last
        same_device = tensor.device == mine.device
        return next((at for at in starts if same_device and torch.equal(tensor, mine[at : at + count])), None)

    def _is_here(self, tensor: Tensor) -> bool:
        return not self._storage.expired() and tensor.untyped_storage()._cdata == self._storage.cdata


def _place(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...], int]:
    return int(tensor.storage_offset()), tensor.dtype, tensor.shape, tensor.stride(), version_of(tensor)
