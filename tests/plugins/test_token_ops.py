from __future__ import annotations

import pytest
import torch

from cat_pruning.plugins.token_ops import token_gather, token_scatter, token_scatter_

SIZES = [(1, 1, 1, 1), (2, 16, 5, 8), (3, 100, 100, 3), (2, 333, 1, 64)]


def _case(
    size: tuple[int, int, int, int], dtype: torch.dtype, index_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, rows, kept, width = size
    generator = torch.Generator().manual_seed(sum(size))
    tokens = torch.randn(batch, rows, width, generator=generator).to(dtype)
    indices = torch.rand(batch, rows, generator=generator).argsort(1)[:, :kept].to(index_dtype)
    return tokens, indices, torch.randn(batch, kept, width, generator=generator).to(dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_against_loops(size: tuple[int, int, int, int], dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    tokens, indices, rows = _case(size, dtype, index_dtype)
    gathered, scattered = token_gather(tokens, indices), token_scatter(tokens, indices, rows)
    expected = tokens.clone()
    for b in range(indices.shape[0]):
        for i, index in enumerate(indices[b].tolist()):
            assert torch.equal(gathered[b, i], tokens[b, index])
            expected[b, index] = rows[b, i]
    assert torch.equal(scattered, expected)


def test_functional_scatter_leaves_its_input_alone_and_the_in_place_one_does_not() -> None:
    tokens, indices, rows = _case((2, 16, 5, 8), torch.float32, torch.int32)
    before = tokens.clone()
    scattered = token_scatter(tokens, indices, rows)
    assert torch.equal(tokens, before)
    assert token_scatter_(tokens, indices, rows) is tokens
    assert torch.equal(tokens, scattered)


@pytest.mark.parametrize("size", SIZES)
def test_operators_are_registered_properly(size: tuple[int, int, int, int]) -> None:
    tokens, indices, rows = _case(size, torch.float32, torch.int32)
    torch.library.opcheck(token_gather, (tokens, indices))
    torch.library.opcheck(token_scatter, (tokens, indices, rows))
