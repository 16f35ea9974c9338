"""PixArt-Σ and PixArt-α: self-attention, and cross-attention to the text (Chen et al. 2024, arXiv 2403.04692)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from cat_pruning.families.attention import check_processor, intercept_attention, split_heads
from cat_pruning.families.configs import PixArtConfig
from cat_pruning.families.family import PatchFamily
from cat_pruning.families.interception import TokenReuse
from cat_pruning.files import read_json
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
    config_model = PixArtConfig

    @override
    def intercept(self, transformer: Any, reuse: TokenReuse) -> None:
        embed = transformer.pos_embed
        # The module itself would add the position; the sum has the dtype of the latents, as there.
        embed.pos_embed = None
        embed.register_forward_hook(
            lambda module, args, tokens: reuse.gather((tokens + reuse.inputs[POSITION]).to(tokens.dtype))
        )
        # The model squeezes axis 1 of what it gets; exported, that would remove the tokens.
        transformer.proj_out.register_forward_hook(lambda module, args, rows: reuse.merge(rows).unsqueeze(1))
        for block in transformer.transformer_blocks:
            intercept_attention(block.attn1, reuse, CacheRows.IMAGE)
            check_processor(block.attn2.processor)
            block.attn2.set_processor(_CrossAttention())

    @override
    def forward_kwargs(self, model_inputs: dict[str, Tensor]) -> dict[str, Any]:
        own = {name: tensor for name, tensor in model_inputs.items() if name not in (POSITION, *SIZE_CONDITIONS)}
        sizes = {name: model_inputs.get(name) for name in SIZE_CONDITIONS}
        return {**own, "added_cond_kwargs": sizes}

    @override
    def caches(self) -> list[CacheSpec]:
        return [CacheSpec(CacheRows.IMAGE, self._width)] * self.config["num_layers"]

    @override
    def predicted_noise(self, noise: Tensor) -> Tensor:
        """The mean; the other half of the channels is a variance that samplers drop."""
        return self.noise_tokens(noise[:, : self.config["in_channels"]])

    @override
    def example_input(self, name: str, shape: list[int], generator: torch.Generator) -> Tensor:
        """A mask with its first column kept, so that no row is empty."""
        values = super().example_input(name, shape, generator)
        if name != "encoder_attention_mask":
            return values
        return torch.cat([torch.ones(shape[0], 1), (values[:, 1:] > 0).float()], dim=1)

    @override
    def text_length(self, model_inputs: Mapping[str, Tensor]) -> int:
        return 0

    @override
    def input_shapes(self, dims: StepDims) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {
            LATENTS: (dims.batch, self.config["in_channels"], dims.latent_height, dims.latent_width),
            TIMESTEP: (dims.batch,),
            "encoder_hidden_states": (dims.batch, dims.text_length, self.config["caption_channels"]),
            "encoder_attention_mask": (dims.batch, dims.text_length),
        }
        if self._has_size_conditions:
            shapes |= {"resolution": (dims.batch, 2), "aspect_ratio": (dims.batch, 1)}
        return {**shapes, POSITION: (1, dims.num_tokens, self._width)}

    @override
    def argument_names(self) -> tuple[str, ...]:
        return (*self.prompt_inputs, *(SIZE_CONDITIONS if self._has_size_conditions else ()))

    @override
    def flatten_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        flat = dict(arguments)
        sizes = flat.pop("added_cond_kwargs", None) or {}
        return {**flat, **sizes}

    @override
    def conditioning(self, arguments: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        side = self.config["sample_size"]
        position = get_2d_sincos_pos_embed(
            self._width,
            grid,
            # As PixArtTransformer2DModel itself has it.
            interpolation_scale=self.config["interpolation_scale"] or max(side // 64, 1),
            base_size=side // self.config["patch_size"],
        )
        return {**arguments, POSITION: position.float().unsqueeze(0)}

    @override
    def pipeline_text_length(self, directory: Path) -> int:
        """No more than the tokenizer makes."""
        index = read_json(directory / "model_index.json")
        length = T5_LENGTHS.get(index["_class_name"], T5_LENGTHS["PixArtSigmaPipeline"])
        return min(length, self.tokenizer_length(directory / "tokenizer"))

    @override
    def pipeline_arguments(self, pipeline: Any, text_length: int) -> dict[str, Any]:
        """Without its binning, which would change the size."""
        return {"max_sequence_length": text_length, "use_resolution_binning": False}

    @property
    @override
    def max_latent_size(self) -> int | None:
        return None

    @property
    def _width(self) -> int:
        return int(self.config["num_attention_heads"] * self.config["attention_head_dim"])

    @property
    def _has_size_conditions(self) -> bool:
        given = self.config["use_additional_conditions"]
        return bool(self.config["sample_size"] == 128 if given is None else given)


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
        # Each query gets a row of the mask: ONNX Runtime's Attention broadcasts it over heads, not over queries.
        mask = None if attention_mask is None else attention_mask.unsqueeze(1).expand(-1, -1, query.shape[2], -1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        projected: Tensor = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
        return projected
