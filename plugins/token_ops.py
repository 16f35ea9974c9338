"""The token operators in torch: rows gathered from, and scattered into, a (B, N, D) tensor by (B, n) indices.

Registered as `cat::token_gather` and `cat::token_scatter`, so that `torch.export` keeps them
whole and the exporter writes them as nodes of our own ONNX domain (`cat_pruning.plugins.onnx_ops`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _flat(indices: Tensor, num_tokens: int) -> Tensor:
    """The places of (B, n) indices among the rows of all B * N tokens, (B * n): whole rows are moved then."""
    first = torch.arange(indices.shape[0], device=indices.device).unsqueeze(-1) * num_tokens
    return (indices + first).flatten()


@torch.library.custom_op("cat::token_gather", mutates_args=())
def token_gather(tokens: Tensor, indices: Tensor) -> Tensor:
    """Rows of `tokens` by index: out[b, i, :] = tokens[b, indices[b, i], :].

    Args:
        tokens: (B, N, D), any dtype.
        indices: (B, n) int32 or int64, each in [0, N).

    Returns:
        (B, n, D), new memory. Does not synchronise.
    """
    rows = tokens.flatten(0, 1).index_select(0, _flat(indices, tokens.shape[1]))
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
    tokens.view(-1, tokens.shape[-1]).index_copy_(0, _flat(indices, tokens.shape[1]), rows.flatten(0, 1))
    return tokens
