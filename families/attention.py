"""Attention of kept tokens over cached rows: the second interception point, for every family."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_pruning.errors import SettingsError
from cat_pruning.families.interception import LayerCache, TokenReuse
from cat_pruning.step_io import CacheRows

# In the names of diffusers' processors that compute something else than the model's attention, and what that is.
_OTHERS: Final = {
    "IPAdapter": "an IP-adapter",
    "PAG": "perturbed-attention guidance",
    "CustomDiffusion": "custom diffusion",
}

Rotary = tuple[Tensor, Tensor]  # cos and sin of every new row, each (B, rows, head width), fp32


class CachedAttention:
    """A processor of diffusers' attention: kept image rows, and text rows where there are any, over all cached rows.

    The arithmetic of JointAttnProcessor2_0, FluxAttnProcessor and AttnProcessor2_0, with their concatenation of keys
    and values replaced by one scatter into the layer's caches.

    Args:
        reuse: holds the caches.
        layer: its caches.
        rows: JOINT where the new rows are image and text rows, whether they come apart or already concatenated.
        is_fused: whether diffusers' `fuse_qkv_projections` made one product of query, key and value.
    """

    def __init__(self, reuse: TokenReuse, layer: LayerCache, rows: CacheRows, *, is_fused: bool = False) -> None:
        self.reuse = reuse
        self.layer = layer
        self.rows = rows
        self.is_fused = is_fused

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # (B, n, D)
        encoder_hidden_states: Tensor | None = None,  # (B, T, D)
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The attention of one block; called by diffusers' attention module."""
        query, key, value = self._projections(attn, hidden_states)
        query, key = _normed(query, attn.norm_q, attn.heads), _normed(key, attn.norm_k, attn.heads)
        text: tuple[Tensor, Tensor] | None = None  # its keys and values
        if encoder_hidden_states is not None:
            text_query, text_key, text_value = self._text_projections(attn, encoder_hidden_states)
            text = _normed(text_key, attn.norm_added_k, attn.heads), text_value
            text_query = _normed(text_query, attn.norm_added_q, attn.heads)
            query = self.reuse.joined(query, text_query)  # (B, n + T, D)
        if image_rotary_emb is not None:
            if text is not None:  # all rows are rotated at once
                key, value = (self.reuse.joined(*pair) for pair in zip((key, value), text, strict=True))
                text = None
            query = _rotated(query, image_rotary_emb, attn.heads)
            key = _rotated(key, image_rotary_emb, attn.heads)

        key, value = self.reuse.update(self.layer, self.rows, key, value, text)  # (B, S, D)
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

    def _projections(self, attn: Any, rows: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values: (B, n, D) each."""
        if self.is_fused:
            return attn.to_qkv(rows).chunk(3, dim=-1)  # type: ignore[no-any-return]
        return attn.to_q(rows), attn.to_k(rows), attn.to_v(rows)

    def _text_projections(self, attn: Any, rows: Tensor) -> tuple[Tensor, ...]:
        """Those of the text rows: (B, T, D) each."""
        if self.is_fused:
            return attn.to_added_qkv(rows).chunk(3, dim=-1)  # type: ignore[no-any-return]
        return attn.add_q_proj(rows), attn.add_k_proj(rows), attn.add_v_proj(rows)


def intercept_attention(attn: Any, reuse: TokenReuse, rows: CacheRows) -> None:
    """Let `attn` attend over caches of its own, which are the next of `reuse`: see `CachedAttention`.

    Raises:
        SettingsError: its processor is not the model's own.
    """
    from diffusers.models.attention_processor import Attention

    check_processor(attn.processor)
    # diffusers' older class keeps its flag when the projections are taken apart again; its processor does not.
    is_fused = getattr(attn, "fused_projections", False) and (
        not isinstance(attn, Attention) or type(attn.processor).__name__.startswith("Fused")
    )
    attn.set_processor(CachedAttention(reuse, reuse.new_layer(), rows, is_fused=is_fused))


def check_processor(processor: object) -> None:
    """That a processor computes the model's own attention, so that another may stand in for it.

    Raises:
        SettingsError: it is a user's, an IP-adapter's, perturbed attention's.
    """
    kind = type(processor)
    what = next((what for word, what in _OTHERS.items() if word in kind.__name__), None)
    if kind.__module__.startswith("diffusers.") and what is None:
        return
    raise SettingsError(
        f"{kind.__name__}: {what or 'a processor of your own'} changes what attention computes, and pruned steps have "
        "an attention of their own",
        "use the original transformer, or take the processor off it first",
    )


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
