"""What every measurement is told, and how it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from cat_pruning.settings import PruneSettings

Results = Iterator[tuple[str, Any]]  # named, as they come

LOOP_STEPS = (28, 50)
PIXELS = 1024  # of a side
MODELS = ("sd3", "pixart-sigma")  # that are measured where none is named
LARGE_MODEL = "flux-dev"
_TOKENS, _TINY_TOKENS = 64, 8  # of a side of 1024 pixels
# The same code at sizes for a machine without a GPU: changes of the config.
TINY: dict[str, dict[str, Any]] = {
    "sd3": {
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
    },
    "pixart-sigma": {
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 6,
        "cross_attention_dim": 48,
        "caption_channels": 24,
    },
    LARGE_MODEL: {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (2, 2, 4),
    },
}
TINY_TEXT = 7  # rows


@dataclass(frozen=True)
class Setting:
    """What every measurement is told.

    tiny: sizes for a machine without a GPU. steps: of the loops. pixels: of a side of the image. prompts: at once.
    compiled: whether our engine is to be the compiled one, where nothing else is said.
    """

    model: str
    device: torch.device
    tiny: bool = False
    rounds: int = 9
    steps: tuple[int, ...] = LOOP_STEPS
    prune: PruneSettings = field(default_factory=PruneSettings)
    pixels: int = PIXELS
    prompts: int = 1
    compiled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; a CPU is exact enough to be tested in fp32 only."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens, high and wide."""
        side = (_TINY_TOKENS if self.tiny else _TOKENS) * self.pixels // PIXELS
        return side, side

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    def replace(self, **changes: Any) -> Setting:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def engine_options(self) -> dict[str, bool]:
        """Keywords of `TorchStepEngine` besides `cuda_graphs`."""
        return {"compiled": self.compiled}
