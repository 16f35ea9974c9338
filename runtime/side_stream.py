"""A CUDA stream of our own, for libraries that synchronise or fail on the default one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A stream whose work takes its turn in that of the current stream. On a CPU, nothing.

    Attributes:
        handle: the `cudaStream_t` as a number; 0 on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.handle: int = self._stream.cuda_stream if self._stream is not None else 0

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """What is launched on the stream meanwhile runs after the current stream's work so far and before what follows.

        Only the device waits. In a capture the stream is captured too.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                yield
            finally:
                current.wait_stream(self._stream)
