"""Stable Diffusion 3: joint attention over image and text rows (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_pruning.exporter.families.family import Family
from cat_pruning.exporter.interception import TokenReuse
from cat_pruning.step_io import CacheRows, CacheSpec, Shape, StepDims

T5_LENGTH = 256  # StableDiffusion3Pipeline's default max_sequence_length


class StableDiffusion3(Family):
    """SD3-medium and every SD3Transformer2DModel of its kind."""

    name = "sd3"
    transformer_class = "SD3Transformer2DModel"
    pipeline_class = "StableDiffusion3Pipeline"
    hub_id = "stabilityai/stable-diffusion-3-medium-diffusers"
    published_config = "sd3-medium.json"
    input_names = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")

    def intercept(self, transformer: Any, reuse: TokenReuse) -> None:
        """See `Family.intercept`."""
        transformer.pos_embed.register_forward_hook(lambda module, args, tokens: reuse.gather(tokens))
        transformer.proj_out.register_forward_hook(lambda module, args, rows: reuse.merge(rows))
        layer = 0
        for block in transformer.transformer_blocks:
            block.attn.set_processor(CachedJointAttention(reuse, layer))
            layer += 1
            if block.use_dual_attention:
                block.attn2.set_processor(CachedJointAttention(reuse, layer))
                layer += 1

    def caches(self, config: Mapping[str, Any]) -> list[CacheSpec]:
        """See `Family.caches`."""
        width = config["num_attention_heads"] * config["attention_head_dim"]
        specs = []
        for layer in range(config["num_layers"]):
            specs.append(CacheSpec(CacheRows.JOINT, width))
            if layer in config["dual_attention_layers"]:
                specs.append(CacheSpec(CacheRows.IMAGE, width))
        return specs

    def patchify(self, noise: Tensor, config: Mapping[str, Any]) -> Tensor:
        """See `Family.patchify`."""
        patch = config["patch_size"]
        batch, channels, height, width = noise.shape
        patches = noise.reshape(batch, channels, height // patch, patch, width // patch, patch)
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(
            batch, (height // patch) * (width // patch), patch * patch * channels
        )

    def text_length(self, model_inputs: Mapping[str, Tensor]) -> int:
        """See `Family.text_length`."""
        return model_inputs["encoder_hidden_states"].shape[1]

    def input_shapes(self, config: Mapping[str, Any], dims: StepDims) -> dict[str, Shape]:
        """See `Family.input_shapes`."""
        return {
            "hidden_states": (dims.batch, config["in_channels"], dims.latent_height, dims.latent_width),
            "timestep": (dims.batch,),
            "encoder_hidden_states": (dims.batch, dims.text_length, config["joint_attention_dim"]),
            "pooled_projections": (dims.batch, config["pooled_projection_dim"]),
        }

    def pipeline_text_length(self, directory: Path) -> int:
        """See `Family.pipeline_text_length`: CLIP's tokens, then T5's, or as many empty ones where there is no T5."""
        tokenizer = json.loads((directory / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
        return int(tokenizer["model_max_length"]) + T5_LENGTH

    def pipeline_arguments(self, pipeline: Any, text_length: int) -> dict[str, Any]:
        """See `Family.pipeline_arguments`."""
        return {"max_sequence_length": text_length - pipeline.tokenizer_max_length}

    def max_latent_size(self, config: Mapping[str, Any]) -> int | None:
        """See `Family.max_latent_size`."""
        return int(config["pos_embed_max_size"] * config["patch_size"])


class CachedJointAttention:
    """Attention of the kept image rows, and the text rows where there are any, over all cached rows.

    The arithmetic of diffusers' JointAttnProcessor2_0, with its concatenation of keys and values
    replaced by one scatter into the caches. Serves SD3.5's second attention too, which has no text rows.
    """

    def __init__(self, reuse: TokenReuse, layer: int) -> None:
        self.reuse = reuse
        self.layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # (B, n, D)
        encoder_hidden_states: Tensor | None = None,  # (B, T, D)
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The attention of one block; called by diffusers' `Attention`."""
        num_kept = hidden_states.shape[1]
        rows = CacheRows.IMAGE
        query = _normed(attn.to_q(hidden_states), attn.norm_q, attn.heads)
        key = _normed(attn.to_k(hidden_states), attn.norm_k, attn.heads)
        value = attn.to_v(hidden_states)
        if encoder_hidden_states is not None:
            rows = CacheRows.JOINT
            text_query = _normed(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q, attn.heads)
            text_key = _normed(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k, attn.heads)
            query = torch.cat([query, text_query], dim=1)  # (B, n + T, D)
            key = torch.cat([key, text_key], dim=1)
            value = torch.cat([value, attn.add_v_proj(encoder_hidden_states)], dim=1)

        key, value = self.reuse.update(self.layer, rows, key, value)  # (B, S, D)
        hidden_states = F.scaled_dot_product_attention(
            _split_heads(query, attn.heads), _split_heads(key, attn.heads), _split_heads(value, attn.heads)
        )
        hidden_states = hidden_states.transpose(1, 2).flatten(2)  # (B, n + T, D)

        image_states: Tensor = attn.to_out[1](attn.to_out[0](hidden_states[:, :num_kept]))
        if encoder_hidden_states is None:
            return image_states
        text_states = hidden_states[:, num_kept:]
        return image_states, text_states if attn.context_pre_only else attn.to_add_out(text_states)


def _split_heads(rows: Tensor, heads: int) -> Tensor:
    heads_last: Tensor = rows.unflatten(-1, (heads, -1))
    return heads_last.transpose(1, 2)  # (B, heads, rows, D / heads)


def _normed(rows: Tensor, norm: nn.Module | None, heads: int) -> Tensor:
    """The per-head norm of queries and keys (SD3.5); SD3 has none."""
    if norm is None:
        return rows
    normed: Tensor = norm(rows.unflatten(-1, (heads, -1)))
    return normed.flatten(2)
