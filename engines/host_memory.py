"""Memory of the processor that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back_freed_memory() -> None:
    """Give the pages that hold nothing any more back to the system, where malloc is glibc's; elsewhere, nothing.

    glibc keeps them for allocations as large, and finds none among those of another shape: a process that makes images
    of many sizes grows, though nothing in it does. Takes some 10 ms.
    """
    if trim := _malloc_trim():
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # musl has none
        return None
    return found
