"""The number formats that an engine computes in."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

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
