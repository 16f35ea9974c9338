"""The number formats that an engine computes in."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from cat_pruning.errors import SettingsError

if TYPE_CHECKING:
    # Not as `torch`: inside the class that name is the property's.
    from torch import dtype as torch_dtype


class DType(StrEnum):
    """A number format; its value is the word in manifests, file names and on the command line."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def torch(self) -> torch_dtype:
        """The same format as torch names it; imports torch on first use."""
        import torch

        return {DType.FP32: torch.float32, DType.FP16: torch.float16, DType.BF16: torch.bfloat16}[self]

    @property
    def num_bytes(self) -> int:
        """Bytes per value."""
        return 4 if self is DType.FP32 else 2


def torch_dtype_of(dtype: DType | torch_dtype | str) -> torch_dtype:
    """A number format as torch names it: of our words, of torch's ("float16"), or torch's own.

    Raises:
        SettingsError: it is none of them.
    """
    known = [format.torch for format in DType]
    for word, one in zip(DType, known, strict=True):
        if dtype in (word, one, str(one), str(one).removeprefix("torch.")):
            return one
    raise SettingsError(f"dtype={dtype!r}: expected {', '.join(DType)}, or one of {', '.join(map(str, known))}")
