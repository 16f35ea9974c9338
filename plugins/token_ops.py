"""The token operators in torch: rows gathered from, and scattered into, a (B, N, D) tensor by (B, n) indices.

Registered as `cat::token_gather` and `cat::token_scatter`, so that `torch.export` keeps them
whole and the exporter writes them as nodes of our own ONNX domain (`cat_pruning.plugins.onnx_ops`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _expand(indices: Tensor, channels: int) -> Tensor:
    return indices.long().unsqueeze(-1).expand(-1, -1, channels)  # (B, n, D), no memory of its own


@torch.library.custom_op("cat::token_gather", mutates_args=())
def token_gather(tokens: Tensor, indices: Tensor) -> Tensor:
    """Rows of `tokens` by index: out[b, i, :] = tokens[b, indices[b, i], :].

    Args:
        tokens: (B, N, D), any dtype.
        indices: (B, n) int32 or int64, each in [0, N).

    Returns:
        (B, n, D), new memory. Does not synchronise.
    """
    return tokens.gather(1, _expand(indices, tokens.shape[-1]))


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
    return tokens.scatter(1, _expand(indices, tokens.shape[-1]), rows)


@token_scatter.register_fake
def _(tokens: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(tokens)


def token_scatter_(tokens: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """`token_scatter` in place: `tokens` itself is changed and returned."""
    return tokens.scatter_(1, _expand(indices, tokens.shape[-1]), rows)
