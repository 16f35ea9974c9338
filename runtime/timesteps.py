"""Reading timesteps without stopping the GPU, and telling the schedules apart that they come from."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cat_pruning.errors import SettingsError

_MOST_SCHEDULES: Final = 4  # of pipelines that take turns on one thread


class PipelineSchedule:
    """The timesteps that a scheduler was set to, as they lie in memory.

    Args:
        tensor: a view of them.

    Attributes:
        values: all of them.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._dtype, self._version = tensor.dtype, version_of(tensor)
        self.values: list[float] = _whole_storage(tensor).cpu().double().tolist()

    @property
    def is_gone(self) -> bool:
        """Whether nobody holds its tensor any more: no call can come that reads it."""
        return bool(self._storage.expired())

    def holds(self, timestep: Tensor) -> bool:
        """Whether `timestep` is a view of this schedule, not written to since."""
        return bool(
            timestep.untyped_storage()._cdata == self._storage.cdata
            and timestep.dtype == self._dtype
            and version_of(timestep) == self._version
        )


class NoiseLevel(NamedTuple):
    """Where a call is in its pipeline's schedule.

    Attributes:
        timestep: its value.
        precision: machine epsilon of the dtype that it came in; 0 of integers.
        schedule: the one that it is a view of; None where a pipeline passes it by itself, as FLUX's do.
        place: in the schedule's memory; 0 without one.
    """

    timestep: float
    precision: float = 0.0
    schedule: PipelineSchedule | None = None
    place: int = 0

    @property
    def is_last(self) -> bool:
        """Whether it is known to be the schedule's last one."""
        return self.schedule is not None and self.place == len(self.schedule.values) - 1

    @property
    def expected(self) -> list[float]:
        """The timesteps of its schedule; empty without one."""
        return self.schedule.values if self.schedule else []


class TimestepReader:
    """The host's view of the timesteps that a pipeline passes.

    diffusers' pipelines pass `scheduler.timesteps[i].expand(batch)`, a view of the whole schedule. The schedule is
    copied to the host once, when it is first seen, and later calls look their value up by the view's offset: one
    synchronisation per image. Timesteps that are no such view cost one each.
    """

    def __init__(self) -> None:
        self._schedules: list[PipelineSchedule] = []

    def read(self, timestep: Tensor) -> NoiseLevel:
        """Where a call is.

        Args:
            timestep: (B,) or scalar, all entries alike.

        Raises:
            SettingsError: the entries differ.
        """
        schedule = next((known for known in self._schedules if known.holds(timestep)), None)
        if schedule is None:
            schedule = PipelineSchedule(timestep)
            if len(set(schedule.values)) > 1:  # else a batch of one timestep
                living = [known for known in self._schedules if not known.is_gone]
                self._schedules = [schedule, *living][:_MOST_SCHEDULES]
        place = int(timestep.storage_offset())
        value = schedule.values[place]
        if timestep.dim() and timestep.stride(0):
            row = schedule.values[place : place + timestep.shape[0] * timestep.stride(0) : timestep.stride(0)]
            if any(other != value for other in row):
                raise SettingsError(
                    f"the rows of one call are at different timesteps: {', '.join(f'{each:g}' for each in row)}",
                    "call with one noise level; images at different ones are stepped each by its own `image()`",
                )
        is_schedule = schedule in self._schedules
        return NoiseLevel(value, precision_of(timestep), schedule if is_schedule else None, place if is_schedule else 0)


def _whole_storage(tensor: Tensor) -> Tensor:
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((size,), (1,), 0)


def version_of(tensor: Tensor) -> int:
    """How often a tensor's memory was written to, as far as torch counts it."""
    return -1 if tensor.is_inference() else tensor._version  # inference tensors do not count their writes


def precision_of(timestep: Tensor) -> float:
    """Machine epsilon of the dtype that a timestep comes in; 0 of integers."""
    return torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
