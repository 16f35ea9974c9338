"""What holds for all calls of one image, and how a call is known to be of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cat_pruning.engines.step_engine import StepSession
from cat_pruning.runtime.timesteps import version_of


class Image:
    """What holds for all calls of one image: its shapes, and what the pipeline says of it.

    Args:
        session: computes it.
        latents, arguments: of its first call.

    Raises:
        ShapeError: the latents do not fit the model.
    """

    def __init__(self, session: StepSession, latents: Tensor, arguments: Mapping[str, Tensor]) -> None:
        family = session.engine.family
        self.grid = family.grid(latents, arguments)
        self.conditioning = family.conditioning(arguments, self.grid)
        self.dims = family.dims(
            self.grid,
            batch=latents.shape[0],
            text_length=family.argument_text_length(arguments),
            num_kept=0,
        )
        self._latents_shape = latents.shape
        self._memory = {name: Memory(tensor) for name, tensor in arguments.items()}

    def is_for(self, latents: Tensor) -> bool:
        """Whether the latents have the image's shape."""
        return latents.shape == self._latents_shape

    def holds(self, latents: Tensor, arguments: Mapping[str, Tensor]) -> bool:
        """Whether a call is of this image."""
        return self.is_for(latents) and all(memory.holds(arguments[name]) for name, memory in self._memory.items())


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
