"""Attention of kept tokens over cached rows: the second interception point, for every family."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_pruning.exporter.interception import TokenReuse
from cat_pruning.step_io import CacheRows

Rotary = tuple[Tensor, Tensor]  # cos and sin of every new row, each (B, rows, head width), fp32


class CachedAttention:
    """A processor of diffusers' attention: kept image rows, and text rows where there are any, over all cached rows.

    The arithmetic of JointAttnProcessor2_0, FluxAttnProcessor and AttnProcessor2_0, with their concatenation of keys
    and values replaced by one scatter into the layer's caches.

    Args:
        reuse: holds the caches.
        layer: whose caches.
        rows: JOINT where the new rows are image and text rows, whether they come apart or already concatenated.
    """

    def __init__(self, reuse: TokenReuse, layer: int, rows: CacheRows) -> None:
        self.reuse = reuse
        self.layer = layer
        self.rows = rows

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # (B, n, D)
        encoder_hidden_states: Tensor | None = None,  # (B, T, D)
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The attention of one block; called by diffusers' attention module."""
        query = _normed(attn.to_q(hidden_states), attn.norm_q, attn.heads)
        key = _normed(attn.to_k(hidden_states), attn.norm_k, attn.heads)
        value = attn.to_v(hidden_states)
        if encoder_hidden_states is not None:
            text_query = _normed(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q, attn.heads)
            text_key = _normed(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k, attn.heads)
            query = self._concatenated(query, text_query)  # (B, n + T, D)
            key = self._concatenated(key, text_key)
            value = self._concatenated(value, attn.add_v_proj(encoder_hidden_states))
        if image_rotary_emb is not None:
            query = _rotated(query, image_rotary_emb, attn.heads)
            key = _rotated(key, image_rotary_emb, attn.heads)

        key, value = self.reuse.update(self.layer, self.rows, key, value)  # (B, S, D)
        attended = F.scaled_dot_product_attention(
            split_heads(query, attn.heads), split_heads(key, attn.heads), split_heads(value, attn.heads)
        )
        attended = attended.transpose(1, 2).flatten(2)  # (B, n (+ T), D)

        if encoder_hidden_states is None:
            return _projected(attn, attended)
        num_text = encoder_hidden_states.shape[1]
        if self.reuse.text_first:
            text_states, image_states = attended[:, :num_text], attended[:, num_text:]
        else:
            num_kept = hidden_states.shape[1]
            image_states, text_states = attended[:, :num_kept], attended[:, num_kept:]
        return _projected(attn, image_states), text_states if attn.context_pre_only else attn.to_add_out(text_states)

    def _concatenated(self, image: Tensor, text: Tensor) -> Tensor:
        return torch.cat([text, image] if self.reuse.text_first else [image, text], dim=1)


def split_heads(rows: Tensor, heads: int) -> Tensor:
    """(B, rows, D) -> (B, heads, rows, D / heads)."""
    heads_last: Tensor = rows.unflatten(-1, (heads, -1))
    return heads_last.transpose(1, 2)


def _projected(attn: Any, attended: Tensor) -> Tensor:
    if getattr(attn, "pre_only", False):  # FLUX's single blocks project it together with the MLP
        return attended
    projected: Tensor = attn.to_out[1](attn.to_out[0](attended))
    return projected


def _normed(rows: Tensor, norm: nn.Module | None, heads: int) -> Tensor:
    """The per-head norm of queries and keys (SD3.5, FLUX); SD3 and PixArt have none."""
    if norm is None:
        return rows
    normed: Tensor = norm(rows.unflatten(-1, (heads, -1)))
    return normed.flatten(2)


def _rotated(rows: Tensor, rotary: Rotary, heads: int) -> Tensor:
    """Rotary position embedding (Su et al. 2021), adjacent channels paired, as diffusers' `apply_rotary_emb`."""
    cos, sin = (part.unsqueeze(2) for part in rotary)  # (B, rows, 1, head width)
    by_head = rows.unflatten(-1, (heads, -1))
    real, imaginary = by_head.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    rotated: Tensor = by_head.float() * cos + turned.float() * sin
    return rotated.to(rows.dtype).flatten(2)
