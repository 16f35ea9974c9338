from __future__ import annotations

import pytest
import torch
from muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_steps_as_torchs_own(shape: tuple[int, int]) -> None:
    """But for bf16, in which torch's orthogonalizes."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizers = (
        Muon([ours], lr=0.02, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        for matrix, optimizer in zip((ours, theirs), optimizers, strict=True):
            matrix.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 0.02 * moved


def test_a_checkpoint_of_torchs_is_resumed() -> None:
    matrix = torch.ones(3, 2).requires_grad_()
    matrix.grad = torch.eye(3, 2)
    theirs = torch.optim.Muon([matrix], lr=0.02, weight_decay=0.1)
    theirs.step()
    ours = Muon([matrix], lr=1.0, weight_decay=0.0)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.state[matrix]["momentum_buffer"], theirs.state[matrix]["momentum_buffer"])
    before = matrix.detach().clone()
    ours.step()
    assert 0 < (matrix - before).norm() < 0.1  # at the resumed learning rate


def test_a_matrix_without_a_gradient_stays() -> None:
    matrix = torch.ones(3, 2).requires_grad_()
    assert Muon([matrix], lr=1.0, weight_decay=0.5).step(lambda: 2.5) == 2.5
    assert torch.equal(matrix, torch.ones(3, 2))


@pytest.mark.parametrize("shape", [(16, 16), (6, 30), (30, 6)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.3
