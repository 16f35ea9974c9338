"""The parts of an output that have weights of their own: what guidance makes of the transformer's rows."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.tuning.recordings import guided_parts

_TOLERANCE: Final = {
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}  # guidance rounded in another order


def parts_of(noise: Tensor, latents: Tensor, scale: float) -> Tensor:
    """The parts whose sum the scheduler gets, float32 on the CPU: (R, Q, …).

    Args:
        noise: the transformer's output: a row for each prompt, or under batched guidance two, [negative; positive]. A
            model that predicts its variance too has twice the channels.
        latents: the scheduler's, (R, …).
        scale: of guidance.
    """
    noise = noise.detach().to("cpu", torch.float32)
    if noise.shape[1:] != latents.shape[1:]:
        noise = noise[:, : latents.shape[1]]
    if len(noise) == len(latents):
        return noise[:, None]
    negative, positive = noise.chunk(2)
    return guided_parts(negative, positive, scale)


def check_parts(parts: Tensor, output: Tensor, dtype: torch.dtype, pipe: Any) -> None:
    """Check that the parts add up to what the scheduler got.

    Raises:
        SettingsError: they do not: the pipeline combines the model's outputs in another way.
    """
    found = parts.sum(1)
    off = float((found - output).norm() / output.norm()) if found.shape == output.shape else float("inf")
    if not off <= _TOLERANCE[dtype]:
        raise SettingsError(
            f"{type(pipe).__name__} does not combine the model's outputs as plain guidance does (off by {off:.1e})",
            "tune it without other guidance, at a constant guidance scale",
        )
