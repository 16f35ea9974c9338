from __future__ import annotations

import pytest
import torch

from cat_pruning.plugins.token_ops import (
    row_places,
    token_gather,
    token_scatter,
    token_scatter_,
    write_rows_,
    write_slice_,
)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 8, 12])  # not, always, and with some dtypes a multiple of the words that move
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_rows_and_slices_are_written_in_place(dtype: torch.dtype, width: int, strided: bool, shift: int) -> None:
    """To the bit, NaN and all: from rows of a wider tensor too, as a fused projection's, and amid other memory."""
    tokens, indices, rows = _case((2, 16, 5, width), dtype, torch.int64)
    rows[0, 0, 0] = float("nan")
    tokens = torch.cat([torch.zeros(shift, dtype=dtype), tokens.flatten()])[shift:].view_as(tokens)
    given = torch.cat([torch.zeros_like(rows), rows], dim=-1)[..., width:] if strided else rows
    expected = tokens.clone()
    for b in range(2):
        expected[b, indices[b]] = rows[b]
    expected[:, 11:] = rows
    write_rows_(tokens, row_places(indices, 16), given)
    write_slice_(tokens, 11, given)
    assert torch.equal(tokens.nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(tokens.isnan(), expected.isnan())


def test_operators_that_write_are_registered_properly() -> None:
    """As torch.compile needs them: a graph with them traces, and changes nothing but what they say."""
    tokens, indices, rows = _case((2, 16, 5, 8), torch.float32, torch.int32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.cat.write_rows_, (tokens, row_places(indices, 16), rows), test_utils=tests)
    torch.library.opcheck(torch.ops.cat.write_slice_, (tokens, 3, rows), test_utils=tests)
