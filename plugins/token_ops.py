"""The token operators in torch: rows gathered from, and scattered into, a (B, N, D) tensor by (B, n) indices.

Registered as `cat::token_gather` and `cat::token_scatter`, so that `torch.export` keeps them
whole and the exporter writes them as nodes of our own ONNX domain (`cat_pruning.plugins.onnx_ops`).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

WORD: Final = torch.complex128  # torch's type of sixteen bytes; its values are moved and never computed with


@torch.library.custom_op("cat::token_gather", mutates_args=())
def token_gather(tokens: Tensor, indices: Tensor) -> Tensor:
    """Rows of `tokens` by index: out[b, i, :] = tokens[b, indices[b, i], :].

    Args:
        tokens: (B, N, D), any dtype.
        indices: (B, n) int32 or int64, each in [0, N).

    Returns:
        (B, n, D), new memory. Does not synchronise.
    """
    rows = tokens.flatten(0, 1).index_select(0, row_places(indices, tokens.shape[1]))
    return rows.view(*indices.shape, tokens.shape[2])


@token_gather.register_fake
def _(tokens: Tensor, indices: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[0], indices.shape[1], tokens.shape[2])


@torch.library.custom_op("cat::token_scatter", mutates_args=())
def token_scatter(tokens: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """A copy of `tokens` with some rows replaced: out[b, indices[b, i], :] = rows[b, i, :].

    Args:
        tokens: (B, N, D), any dtype.
        indices: (B, n) int32 or int64, each in [0, N), distinct within a row of the batch.
        rows: (B, n, D), of the dtype of `tokens`.

    Returns:
        (B, N, D), new memory. Does not synchronise.
    """
    return token_scatter_(tokens.clone(memory_format=torch.contiguous_format), indices, rows)


@token_scatter.register_fake
def _(tokens: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(tokens)


def token_scatter_(tokens: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """`token_scatter` in place: `tokens`, which must be contiguous, is changed itself and returned."""
    write_rows_(tokens, row_places(indices, tokens.shape[1]), rows)
    return tokens


def row_places(indices: Tensor, num_tokens: int) -> Tensor:
    """The places of (B, n) indices among the rows of all B * N tokens, (B * n) int64: whole rows are moved then."""
    first = torch.arange(indices.shape[0], device=indices.device).unsqueeze(-1) * num_tokens
    return (indices + first).flatten()


def write_rows_(tokens: Tensor, places: Tensor, rows: Tensor) -> None:
    """Replace rows of `tokens` in place: row `places[i]` of all B * N becomes row i of all B * n.

    What torch.compile sees of it is one operator that changes `tokens`; in torch's own operators it would copy the
    whole of `tokens` instead.

    Args:
        tokens: (B, N, D), any dtype, contiguous; changed in place.
        places: (B * n) int64, distinct, from `row_places`.
        rows: (B, n, D); cast where autocast made them of another dtype than `tokens`.

    Does not synchronise.
    """
    if torch.compiler.is_compiling():
        torch.ops.cat.write_rows_(tokens, places, rows)
    else:
        _write_rows(tokens, places, rows)


def write_slice_(tokens: Tensor, start: int, rows: Tensor) -> None:
    """Replace the rows of `tokens` from `start` on in place: tokens[:, start : start + n] = rows. See `write_rows_`."""
    if torch.compiler.is_compiling():
        torch.ops.cat.write_slice_(tokens, start, rows)
    else:
        _write_slice(tokens, start, rows)


def _write_rows(tokens: Tensor, places: Tensor, rows: Tensor) -> None:
    words, new = _in_words(tokens, rows.to(tokens.dtype))
    words.view(-1, words.shape[-1]).index_copy_(0, places, new.flatten(0, 1))


def _write_slice(tokens: Tensor, start: int, rows: Tensor) -> None:
    rows = rows.to(tokens.dtype)
    words, new = _in_words(tokens, rows) if tokens.is_cuda else (tokens, rows)  # a CPU has no use for them here
    words[:, start : start + rows.shape[1]] = new


def _in_words(tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same memory in words of 16 bytes, which a GPU moves in fewer steps, where both lie so that it can."""
    size = WORD.itemsize
    fits = all(
        (tensor.shape[-1] * tensor.itemsize) % size == 0
        and (tensor.storage_offset() * tensor.itemsize) % size == 0
        and tensor.data_ptr() % size == 0
        and tensor.stride(-1) == 1
        and all((stride * tensor.itemsize) % size == 0 for stride in tensor.stride()[:-1])
        for tensor in (tokens, rows)
    )
    return (tokens.view(WORD), rows.view(WORD)) if fits else (tokens, rows)


torch.library.custom_op("cat::write_rows_", _write_rows, mutates_args=("tokens",))
torch.library.custom_op("cat::write_slice_", _write_slice, mutates_args=("tokens",))
