"""PixArt-Σ and PixArt-α: self-attention, and cross-attention to the text (Chen et al. 2024, arXiv 2403.04692)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from cat_pruning.families.attention import intercept_attention, split_heads
from cat_pruning.families.family import PatchFamily
from cat_pruning.families.interception import TokenReuse
from cat_pruning.step_io import LATENTS, TIMESTEP, CacheRows, CacheSpec, Shape, StepDims

# The pipelines' default max_sequence_length.
T5_LENGTHS = {"PixArtSigmaPipeline": 300, "PixArtAlphaPipeline": 120}
POSITION = "position"
SIZE_CONDITIONS = ("resolution", "aspect_ratio")  # PixArt-α at 1024 x 1024


class PixArt(PatchFamily):
    """Every PixArtTransformer2DModel.

    Its position embedding depends on the size of the image and is computed in double precision, which engines do not
    have: it is an input, made once per image by diffusers' own function.
    """

    name = "pixart"
    transformer_class = "PixArtTransformer2DModel"
    timestep_inputs = (TIMESTEP, *SIZE_CONDITIONS)
    prompt_inputs = ("encoder_hidden_states", "encoder_attention_mask")
    fp32_inputs = (TIMESTEP, POSITION)
    former_norm_type = "ada_norm_single"

    def intercept(self, transformer: Any, reuse: TokenReuse) -> None:
        """See `Family.intercept`."""
        embed = transformer.pos_embed
        # What the module would add itself; in the dtype of the latents at the end, as there.
        embed.pos_embed = None
        embed.register_forward_hook(
            lambda module, args, tokens: reuse.gather((tokens + reuse.inputs[POSITION]).to(tokens.dtype))
        )
        # The model squeezes axis 1 of what it gets; exported, that would remove the tokens.
        transformer.proj_out.register_forward_hook(lambda module, args, rows: reuse.merge(rows).unsqueeze(1))
        for block in transformer.transformer_blocks:
            intercept_attention(block.attn1, reuse, CacheRows.IMAGE)
            block.attn2.set_processor(_CrossAttention())

    def forward_kwargs(self, model_inputs: dict[str, Tensor]) -> dict[str, Any]:
        """See `Family.forward_kwargs`."""
        own = {name: tensor for name, tensor in model_inputs.items() if name not in (POSITION, *SIZE_CONDITIONS)}
        sizes = {name: model_inputs.get(name) for name in SIZE_CONDITIONS}
        return {**own, "added_cond_kwargs": sizes}

    def caches(self, config: Mapping[str, Any]) -> list[CacheSpec]:
        """See `Family.caches`."""
        return [CacheSpec(CacheRows.IMAGE, _width(config))] * config["num_layers"]

    def predicted_noise(self, noise: Tensor, config: Mapping[str, Any]) -> Tensor:
        """See `Family.predicted_noise`: the mean; the other half of the channels is a variance that samplers drop."""
        return self.noise_tokens(noise[:, : config["in_channels"]], config)

    def example_input(self, name: str, shape: list[int], generator: torch.Generator) -> Tensor:
        """See `Family.example_input`: a mask with its first column kept, so that no row is empty."""
        values = super().example_input(name, shape, generator)
        if name != "encoder_attention_mask":
            return values
        return torch.cat([torch.ones(shape[0], 1), (values[:, 1:] > 0).float()], dim=1)

    def text_length(self, model_inputs: Mapping[str, Tensor]) -> int:
        """See `Family.text_length`."""
        return 0

    def input_shapes(self, config: Mapping[str, Any], dims: StepDims) -> dict[str, Shape]:
        """See `Family.input_shapes`."""
        shapes: dict[str, Shape] = {
            LATENTS: (dims.batch, config["in_channels"], dims.latent_height, dims.latent_width),
            TIMESTEP: (dims.batch,),
            "encoder_hidden_states": (dims.batch, dims.text_length, config["caption_channels"]),
            "encoder_attention_mask": (dims.batch, dims.text_length),
        }
        if _has_size_conditions(config):
            shapes |= {"resolution": (dims.batch, 2), "aspect_ratio": (dims.batch, 1)}
        return {**shapes, POSITION: (1, dims.num_tokens, _width(config))}

    def argument_names(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """See `Family.argument_names`."""
        return (*self.prompt_inputs, *(SIZE_CONDITIONS if _has_size_conditions(config) else ()))

    def flatten_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family.flatten_arguments`."""
        flat = dict(arguments)
        sizes = flat.pop("added_cond_kwargs", None) or {}
        return {**flat, **sizes}

    def conditioning(
        self, arguments: Mapping[str, Tensor], config: Mapping[str, Any], grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        """See `Family.conditioning`."""
        side = config["sample_size"]
        position = get_2d_sincos_pos_embed(
            _width(config),
            grid,
            # As PixArtTransformer2DModel itself has it.
            interpolation_scale=config["interpolation_scale"] or max(side // 64, 1),
            base_size=side // config["patch_size"],
        )
        return {**arguments, POSITION: position.float().unsqueeze(0)}

    def pipeline_text_length(self, directory: Path) -> int:
        """See `Family.pipeline_text_length`: no more than the tokenizer makes."""
        index = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
        length = T5_LENGTHS.get(index["_class_name"], T5_LENGTHS["PixArtSigmaPipeline"])
        return min(length, self.tokenizer_length(directory / "tokenizer"))

    def pipeline_arguments(self, pipeline: Any, text_length: int) -> dict[str, Any]:
        """See `Family.pipeline_arguments`: without its binning, which would change the size."""
        return {"max_sequence_length": text_length, "use_resolution_binning": False}

    def max_latent_size(self, config: Mapping[str, Any]) -> int | None:
        """See `Family.max_latent_size`."""
        return None


class _CrossAttention:
    """AttnProcessor2_0 for cross-attention, with shapes that the exporter can follow.

    Keys and values depend on the prompt only, so they leave the step.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # (B, n, D)
        encoder_hidden_states: Tensor,  # (B, T, D)
        attention_mask: Tensor | None = None,  # (B, 1, T), added to the scores
    ) -> Tensor:
        """The attention of one block; called by diffusers' attention module."""
        query, key, value = (
            split_heads(rows, attn.heads)
            for rows in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        # Every query of its own: ONNX Runtime's Attention broadcasts a mask over heads, not over queries.
        mask = None if attention_mask is None else attention_mask.unsqueeze(1).expand(-1, -1, query.shape[2], -1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        projected: Tensor = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
        return projected


def _width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _has_size_conditions(config: Mapping[str, Any]) -> bool:
    given = config["use_additional_conditions"]
    return bool(config["sample_size"] == 128 if given is None else given)
