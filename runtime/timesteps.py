"""Reading timesteps without stopping the GPU, and seeing that a new schedule has begun."""

from __future__ import annotations

import torch
from torch import Tensor


class TimestepReader:
    """The host's view of the timesteps that a pipeline passes.

    diffusers' pipelines pass `scheduler.timesteps[i].expand(batch)`, a view of the whole schedule. The schedule is
    copied to the host once, when it is first seen, and later calls look their value up by the view's offset: one
    synchronisation per image. Timesteps that are no such view cost one each.
    """

    def __init__(self) -> None:
        self._schedule: Tensor | None = None  # the memory that was read, kept alive so that nothing takes its address
        self._version = -1
        self._values: list[float] = []

    def read(self, timestep: Tensor) -> tuple[float, bool]:
        """The value of `timestep`, and whether it comes from another schedule than the last one.

        Args:
            timestep: (B,) or scalar, all entries alike.
        """
        known = self._schedule
        if known is None or not _same_storage(timestep, known) or version_of(timestep) != self._version:
            was_schedule = _is_schedule(self._values)
            self._schedule = _whole_storage(timestep)
            self._version = version_of(timestep)
            self._values = self._schedule.cpu().double().tolist()
            is_new = was_schedule and _is_schedule(self._values)
        else:
            is_new = False
        return self._values[timestep.storage_offset()], is_new

    @property
    def schedule(self) -> list[float]:
        """The timesteps of the schedule that was read last; empty where the pipeline passes them one by one."""
        return self._values if _is_schedule(self._values) else []


def _whole_storage(tensor: Tensor) -> Tensor:
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((size,), (1,), 0)


def _is_schedule(values: list[float]) -> bool:
    return len(set(values)) > 1  # a batch of one timestep is no schedule


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return (
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.dtype == other.dtype
        and one.device == other.device
    )


def version_of(tensor: Tensor) -> int:
    """How often a tensor's memory was written to, as far as torch counts it."""
    return -1 if tensor.is_inference() else tensor._version  # inference tensors do not count their writes


def precision_of(timestep: Tensor) -> float:
    """Machine epsilon of the dtype that a timestep comes in; 0 of integers."""
    return torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
