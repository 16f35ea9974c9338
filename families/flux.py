"""FLUX.1: double- and single-stream blocks, rotary positions, packed latents (Black Forest Labs 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn

from cat_pruning.errors import ShapeError
from cat_pruning.families.attention import Rotary, intercept_attention
from cat_pruning.families.family import Family, Modulation
from cat_pruning.families.interception import TokenReuse
from cat_pruning.step_io import LATENTS, TIMESTEP, CacheRows, CacheSpec, Shape, StepDims

T5_LENGTH = 512  # FluxPipeline's default max_sequence_length
PACKING = 2  # FluxPipeline packs 2 x 2 latent pixels into one token
ROTARY = ("rotary_cos", "rotary_sin")


class Flux(Family):
    """Every FluxTransformer2DModel.

    The pipeline packs the latents, so they and the noise are tokens already, (B, N, C). Rotary embeddings depend on the
    positions only and are computed in double precision, which engines do not have: they are inputs, made once per image
    by diffusers' own module. Guidance is an input of the model, so a batch has one row per prompt.
    """

    name = "flux"
    transformer_class = "FluxTransformer2DModel"
    timestep_inputs = (TIMESTEP, "guidance", "pooled_projections")
    prompt_inputs = ("encoder_hidden_states",)
    fp32_inputs = (TIMESTEP, "guidance", *ROTARY)
    text_first = True
    max_timestep = 1.0
    lora_loader = FluxLoraLoaderMixin
    batched_guidance = False
    noise_is_tokens = True

    def intercept(self, transformer: Any, reuse: TokenReuse) -> None:
        """See `Family.intercept`."""
        transformer.x_embedder.register_forward_pre_hook(lambda module, args: (reuse.gather(args[0]), *args[1:]))
        transformer.proj_out.register_forward_hook(lambda module, args, rows: reuse.merge(rows))
        transformer.pos_embed = _KeptRotary(reuse)
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            intercept_attention(block.attn, reuse, CacheRows.JOINT)

    def modulations(self, transformer: Any) -> list[Modulation]:
        """See `Family.modulations`."""
        double = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
        single = [block.norm for block in transformer.single_transformer_blocks]
        return [Modulation(norm) for norm in (*double, *single, transformer.norm_out)]

    def timestep_embedding(self, embed: Any, model_inputs: Mapping[str, Tensor]) -> Tensor:
        """See `Family.timestep_embedding`: as FluxTransformer2DModel scales its timestep and guidance."""
        pooled = model_inputs["pooled_projections"]
        names = [name for name in (TIMESTEP, "guidance") if name in model_inputs]
        embedding: Tensor = embed(*(model_inputs[name].to(pooled) * 1000 for name in names), pooled)
        return embedding

    def forward_kwargs(self, model_inputs: dict[str, Tensor]) -> dict[str, Any]:
        """See `Family.forward_kwargs`."""
        own = {name: tensor for name, tensor in model_inputs.items() if name not in ROTARY}
        no_ids = model_inputs[LATENTS].new_empty(0, 3)  # unread: see `_KeptRotary`
        return {**own, "img_ids": no_ids, "txt_ids": no_ids}

    def caches(self, config: Mapping[str, Any]) -> list[CacheSpec]:
        """See `Family.caches`."""
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return [CacheSpec(CacheRows.JOINT, width)] * (config["num_layers"] + config["num_single_layers"])

    def patch_size(self, config: Mapping[str, Any]) -> int:
        """See `Family.patch_size`."""
        return PACKING

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """See `Family.latent_channels`."""
        return int(config["in_channels"] // PACKING**2)

    def default_latent_size(self, config: Mapping[str, Any]) -> int:
        """See `Family.default_latent_size`; FluxPipeline's default_sample_size."""
        return 128

    def max_latent_size(self, config: Mapping[str, Any]) -> int | None:
        """See `Family.max_latent_size`."""
        return None

    def noise_shape(self, config: Mapping[str, Any], dims: StepDims) -> Shape:
        """See `Family.noise_shape`."""
        return (dims.batch, dims.num_tokens, config["out_channels"] or config["in_channels"])

    def token_mask(self, keep_indices: Tensor, noise: Tensor, config: Mapping[str, Any]) -> Tensor:
        """See `Family.token_mask`."""
        tokens = torch.zeros(noise.shape[:2], device=noise.device)
        return tokens.scatter(1, keep_indices.long(), 1.0).unsqueeze(-1)

    def noise_tokens(self, noise: Tensor, config: Mapping[str, Any]) -> Tensor:
        """See `Family.noise_tokens`."""
        return noise

    def text_length(self, model_inputs: Mapping[str, Tensor]) -> int:
        """See `Family.text_length`."""
        return model_inputs["encoder_hidden_states"].shape[1]

    def input_shapes(self, config: Mapping[str, Any], dims: StepDims) -> dict[str, Shape]:
        """See `Family.input_shapes`."""
        shapes: dict[str, Shape] = {
            LATENTS: (dims.batch, dims.num_tokens, config["in_channels"]),
            TIMESTEP: (dims.batch,),
            "encoder_hidden_states": (dims.batch, dims.text_length, config["joint_attention_dim"]),
            "pooled_projections": (dims.batch, config["pooled_projection_dim"]),
        }
        if config["guidance_embeds"]:
            shapes["guidance"] = (dims.batch,)
        return shapes | dict.fromkeys(ROTARY, (dims.joint_rows, config["attention_head_dim"]))

    def argument_names(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """See `Family.argument_names`."""
        guidance = ("guidance",) if config["guidance_embeds"] else ()
        return ("encoder_hidden_states", "pooled_projections", *guidance, "img_ids", "txt_ids")

    def grid(self, latents: Tensor, arguments: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[int, int]:
        """See `Family.grid`: read off the positions of the image tokens, on the host."""
        ids = arguments["img_ids"]
        num_tokens = latents.shape[1]
        rows, columns = (len(set(ids[..., axis].flatten().tolist())) for axis in (-2, -1))
        if latents.dim() != 3 or rows * columns != num_tokens:
            raise ShapeError(
                f"{LATENTS}: expected packed latents (B, N, C) of one image, got shape {tuple(latents.shape)} with "
                f"img_ids of {rows} rows and {columns} columns"
            )
        return rows, columns

    def conditioning(
        self, arguments: Mapping[str, Tensor], config: Mapping[str, Any], grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        """See `Family.conditioning`."""
        inputs = dict(arguments)
        text_ids, image_ids = (inputs.pop(name) for name in ("txt_ids", "img_ids"))
        # With a leading dimension of the batch in older pipelines.
        text_ids, image_ids = (each[0] if each.dim() == 3 else each for each in (text_ids, image_ids))
        if len(text_ids) != (text_length := inputs["encoder_hidden_states"].shape[1]):
            raise ShapeError(f"txt_ids has {len(text_ids)} rows, expected {text_length} as encoder_hidden_states")
        ids = torch.cat([text_ids, image_ids])
        rotary = FluxPosEmbed(theta=10000, axes_dim=config["axes_dims_rope"])(ids)
        return {**inputs, **dict(zip(ROTARY, rotary, strict=True))}

    def pipeline_text_length(self, directory: Path) -> int:
        """See `Family.pipeline_text_length`: no more than the tokenizer makes."""
        return min(T5_LENGTH, self.tokenizer_length(directory / "tokenizer_2"))

    def pipeline_arguments(self, pipeline: Any, text_length: int) -> dict[str, Any]:
        """See `Family.pipeline_arguments`."""
        return {"max_sequence_length": text_length}


class _KeptRotary(nn.Module):
    """In the place of FluxPosEmbed: rotary embeddings of the text rows and the kept image rows, (B, T + n, width)."""

    def __init__(self, reuse: TokenReuse) -> None:
        super().__init__()
        self.reuse = reuse

    def forward(self, ids: Tensor) -> Rotary:
        rows = self.reuse.row_indices
        assert rows is not None
        cos, sin = (F.embedding(rows, self.reuse.inputs[name]) for name in ROTARY)
        return cos, sin
