"""A truth value that a device computes, read on the host without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HostFlag:
    """One value on its way at a time. Not thread-safe."""

    def __init__(self) -> None:
        self._flag: Tensor | None = None  # on the host
        self._event: Any = None  # when the flag is there

    def forget(self) -> None:
        """Nobody needs the value that was sent."""
        self._event = None

    def send(self, value: Tensor) -> None:
        """Copy a scalar bool tensor of a CUDA device to the host, behind what was launched before."""
        if self._flag is None:
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._flag.copy_(value, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(value.device))

    def poll(self) -> bool | None:
        """The value, once; None while it is not there. Does not synchronise."""
        if self._event is None or not self._event.query():
            return None
        self._event = None
        assert self._flag is not None
        return bool(self._flag)
