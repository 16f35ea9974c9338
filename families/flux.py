"""FLUX.1: double- and single-stream blocks, rotary positions, packed latents (Black Forest Labs 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from cat_pruning.errors import ShapeError
from cat_pruning.families.attention import Rotary, intercept_attention
from cat_pruning.families.configs import FluxConfig
from cat_pruning.families.family import Family, Modulation
from cat_pruning.families.interception import TokenReuse
from cat_pruning.families.residuals import residual_list, without_residuals
from cat_pruning.step_io import LATENTS, TIMESTEP, CacheRows, CacheSpec, Shape, StepDims, residual_names

T5_LENGTH = 512  # FluxPipeline's default max_sequence_length, and its largest
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
    lora_loader = "FluxLoraLoaderMixin"
    batched_guidance = False
    noise_is_tokens = True
    residual_arguments = (
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "controlnet_blocks_repeat",
    )
    config_model = FluxConfig

    @override
    def intercept(self, transformer: Any, reuse: TokenReuse) -> None:
        transformer.x_embedder.register_forward_pre_hook(lambda module, args: (reuse.gather(args[0]), *args[1:]))
        transformer.proj_out.register_forward_hook(lambda module, args, rows: reuse.merge(rows))
        transformer.pos_embed = _KeptRotary(reuse)
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            intercept_attention(block.attn, reuse, CacheRows.JOINT)

    @override
    def modulations(self, transformer: Any) -> list[Modulation]:
        double = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
        single = [block.norm for block in transformer.single_transformer_blocks]
        return [Modulation(norm) for norm in (*double, *single, transformer.norm_out)]

    @override
    def timestep_embedding(self, embed: Any, model_inputs: Mapping[str, Tensor]) -> Tensor:
        """As FluxTransformer2DModel scales its timestep and guidance."""
        pooled = model_inputs["pooled_projections"]
        names = [name for name in (TIMESTEP, "guidance") if name in model_inputs]
        embedding: Tensor = embed(*(model_inputs[name].to(pooled) * 1000 for name in names), pooled)
        return embedding

    @override
    def forward_kwargs(self, model_inputs: dict[str, Tensor]) -> dict[str, Any]:
        own = {name: tensor for name, tensor in without_residuals(model_inputs).items() if name not in ROTARY}
        no_ids = model_inputs[LATENTS].new_empty(0, 3)  # unread: see `_KeptRotary`
        names, num_double = residual_names(self.num_residuals), self.config["num_layers"]
        double, single = (
            [model_inputs[name] for name in part if name in model_inputs] or None
            for part in (names[:num_double], names[num_double:])
        )
        residuals = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
        return {**own, "img_ids": no_ids, "txt_ids": no_ids, **residuals}

    @override
    def caches(self) -> list[CacheSpec]:
        width = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        return [CacheSpec(CacheRows.JOINT, width)] * (self.config["num_layers"] + self.config["num_single_layers"])

    @property
    @override
    def patch_size(self) -> int:
        return PACKING

    @property
    @override
    def latent_channels(self) -> int:
        return int(self.config["in_channels"] // PACKING**2)

    @property
    @override
    def default_latent_size(self) -> int:
        """FluxPipeline's default_sample_size."""
        return 128

    @property
    @override
    def max_latent_size(self) -> int | None:
        return None

    @override
    def noise_shape(self, dims: StepDims) -> Shape:
        return (dims.batch, dims.num_tokens, self.config["out_channels"] or self.config["in_channels"])

    @override
    def token_mask(self, keep_indices: Tensor, noise: Tensor) -> Tensor:
        tokens = torch.zeros(noise.shape[:2], device=noise.device)
        return tokens.scatter(1, keep_indices.long(), 1.0).unsqueeze(-1)

    @override
    def noise_tokens(self, noise: Tensor) -> Tensor:
        return noise

    @override
    def text_length(self, model_inputs: Mapping[str, Tensor]) -> int:
        return model_inputs["encoder_hidden_states"].shape[1]

    @override
    def input_shapes(self, dims: StepDims) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {
            LATENTS: (dims.batch, dims.num_tokens, self.config["in_channels"]),
            TIMESTEP: (dims.batch,),
            "encoder_hidden_states": (dims.batch, dims.text_length, self.config["joint_attention_dim"]),
            "pooled_projections": (dims.batch, self.config["pooled_projection_dim"]),
        }
        if self.config["guidance_embeds"]:
            shapes["guidance"] = (dims.batch,)
        return shapes | dict.fromkeys(ROTARY, (dims.joint_rows, self.config["attention_head_dim"]))

    @override
    def argument_names(self) -> tuple[str, ...]:
        guidance = ("guidance",) if self.config["guidance_embeds"] else ()
        return ("encoder_hidden_states", "pooled_projections", *guidance, "img_ids", "txt_ids")

    @override
    def grid(self, latents: Tensor, arguments: Mapping[str, Tensor]) -> tuple[int, int]:
        """Read off the positions of the image tokens, on the host; those of reference images follow them."""
        ids = _without_batch(arguments["img_ids"]).tolist()
        image = [place for place in ids if place[0] == ids[0][0]]
        if len(image) < len(ids) and (ids[0][0] != 0 or image != ids[: len(image)]):
            raise ShapeError(
                "img_ids: several images whose first is not number 0, as VisualCloze's pipelines make at once; pruned "
                "steps take one image, and reference images after it",
                "use the original transformer",
            )
        rows, columns = (len({place[axis] for place in image}) for axis in (1, 2))
        if latents.dim() != 3 or latents.shape[1] != len(ids) or rows * columns != len(image):
            raise ShapeError(
                f"{LATENTS}: expected packed latents (B, N, C) of one image, got shape {tuple(latents.shape)} with "
                f"img_ids of {rows} rows and {columns} columns"
            )
        return rows, columns

    @override
    def num_references(self, arguments: Mapping[str, Tensor]) -> int:
        """FLUX.1 Kontext's: they have another number in the place of the image's 0."""
        images = _without_batch(arguments["img_ids"])[:, 0]
        return int((images != images[0]).sum())

    @override
    def conditioning(self, arguments: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
        from diffusers.models.transformers.transformer_flux import FluxPosEmbed

        inputs = dict(arguments)
        text_ids, image_ids = (inputs.pop(name) for name in ("txt_ids", "img_ids"))
        text_ids, image_ids = _without_batch(text_ids), _without_batch(image_ids)
        if len(text_ids) != (text_length := inputs["encoder_hidden_states"].shape[1]):
            raise ShapeError(f"txt_ids has {len(text_ids)} rows, expected {text_length} as encoder_hidden_states")
        ids = torch.cat([text_ids, image_ids])
        rotary = FluxPosEmbed(theta=10000, axes_dim=self.config["axes_dims_rope"])(ids)
        return {**inputs, **dict(zip(ROTARY, rotary, strict=True))}

    @property
    @override
    def num_residuals(self) -> int:
        """All double-stream blocks, then all single-stream ones."""
        return int(self.config["num_layers"] + self.config["num_single_layers"])

    @override
    def residuals(self, arguments: Mapping[str, Any]) -> list[Tensor | None]:
        """As FluxTransformer2DModel spreads them; only those of double-stream blocks repeat."""
        of_double, of_single, repeat = self.residual_arguments
        repeats = bool(arguments.get(repeat))
        double = _spread(residual_list(arguments, of_double), self.config["num_layers"], repeats=repeats)
        single = _spread(residual_list(arguments, of_single), self.config["num_single_layers"])
        spread = [*double, *single]
        return spread if any(each is not None for each in spread) else []

    @override
    def pipeline_text_length(self, directory: Path) -> int:
        """No more than the tokenizer makes."""
        return min(T5_LENGTH, self.tokenizer_length(directory / "tokenizer_2"))

    @override
    def pipeline_text_lengths(self, directory: Path) -> range:
        return range(1, T5_LENGTH + 1)

    @override
    def pipeline_arguments(self, pipeline: Any, text_length: int) -> dict[str, Any]:
        return {"max_sequence_length": text_length}


def _without_batch(ids: Tensor) -> Tensor:
    """Positions (N, 3); older pipelines give them a leading dimension."""
    return ids[0] if ids.dim() == 3 else ids


def _spread(given: Sequence[Tensor], num_blocks: int, *, repeats: bool = False) -> list[Tensor | None]:
    """One residual for each block: neighbours share one, or they are taken in turn."""
    if not given:
        return [None] * num_blocks
    if repeats:
        return [given[block % len(given)] for block in range(num_blocks)]
    interval = math.ceil(num_blocks / len(given))
    return [given[block // interval] for block in range(num_blocks)]


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
