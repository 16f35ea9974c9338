"""Muon in fp32: torch orthogonalizes in bf16, which without bf16 units takes three times as long as the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration; Jordan's
NEWTON_SCHULZ_STEPS = 5
MOMENTUM = 0.95


class Muon(Optimizer):
    """`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` with the orthogonalization in the gradients' own dtype.

    Jordan 2024 (kellerjordan.github.io/posts/muon), with steps of AdamW's size as in Liu et al. 2025
    (arXiv 2502.16982): W ← (1 - lr·decay)·W - lr·0.2·√max(rows, columns)·orthogonal(Nesterov momentum).
    A checkpoint of either can be resumed by the other.

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step on every matrix that has a gradient; changes them in place."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)
        return loss


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix of the same singular vectors, whose singular values are near 1 (0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)  # spectral norm at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
