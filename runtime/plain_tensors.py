"""Tensors that a step can compute with: they have values, are dense, and of a number format that torch converts."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.finite import has_values

_FLOATING: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TAKEN: Final = frozenset(
    (*_FLOATING, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def check_plain(name: str, value: object) -> Tensor:
    """A value of a call's argument, which must be a plain tensor. Does not synchronise.

    Raises:
        SettingsError: it is no tensor, has no values (on the meta device), is sparse, nested, quantised, complex or of
            8-bit floats.
    """
    if not isinstance(value, Tensor):
        raise SettingsError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in _TAKEN:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATING)
        raise SettingsError(f"{name}: it is of {value.dtype}", f"convert it: {known}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise SettingsError(f"{name}: expected a dense tensor, got a {kind} one", "make it dense: tensor.to_dense()")
    if not has_values(value.device):
        raise SettingsError(f"{name}: it is on the meta device, which has no values", "make it on another device")
    return value
