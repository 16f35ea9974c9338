"""A CUDA stream of our own, for libraries that synchronise or fail on the default one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A stream whose work takes its turn in that of the current stream. On a CPU, nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def handle(self) -> int:
        """The `cudaStream_t` as a number; 0 on a CPU."""
        return self._stream.cuda_stream if self._stream is not None else 0

    @contextmanager
    def in_turn(self) -> Iterator[int]:
        """The stream to launch on: after the current stream's work so far, and before what follows there.

        Only the device waits. In a capture it is the current stream itself, which is none that anybody synchronises on.
        """
        if self._stream is None:
            yield 0
            return
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            if torch.cuda.is_current_stream_capturing():
                yield current.cuda_stream
                return
            self._stream.wait_stream(current)
            try:
                yield self.handle
            finally:
                current.wait_stream(self._stream)
