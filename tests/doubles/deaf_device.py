"""A device that answers nothing: whatever would stop a GPU, or copies to it or from it, raises.

Torch's "meta" device has shapes and no memory, so `.item()`, a host copy, `nonzero` and whatever else needs a value
fails there by itself. What it would let pass, because a copy to it costs nothing, `deaf()` refuses: tensors of the host
copied to the device, and tensors made on it from Python's numbers. It cannot know what a kernel does inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEAF = torch.device("meta")

_MADE_FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
_INDEXES = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_COPIES = {torch.ops.aten.copy_, torch.ops.aten._to_copy}
_INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


class HostTraffic(RuntimeError):
    """Something went between the host and the device."""


@contextmanager
def deaf() -> Iterator[None]:
    """What runs meanwhile on `DEAF` must leave the host alone."""
    with _Values(), _Traffic():
        yield


class _Values(TorchFunctionMode):
    """Python's numbers as tensors: made on the host and copied, which no operator shows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in _MADE_FROM_VALUES and result.device == DEAF
        indexed = func in _INDEXES and args[0].device == DEAF and _has_list(args[1])
        if made or indexed:
            raise HostTraffic(f"{func.__name__} copies values from the host")
        return result


class _Traffic(TorchDispatchMode):
    """Operators between two devices. A host's scalar is an argument of a kernel, unless it is copied or an index."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(tensor.device == DEAF for tensor in given) or kwargs.get("device") == DEAF
        packet = func.overloadpacket
        strict = packet in _COPIES or packet in _INDEXED
        if on_device and any(tensor.device != DEAF and (strict or tensor.dim()) for tensor in given):
            raise HostTraffic(f"{func} takes a tensor from the host")
        return func(*args, **kwargs)


def _has_list(index: Any) -> bool:
    return any(isinstance(part, (list, range)) for part in (index if isinstance(index, tuple) else (index,)))
