"""Stable Diffusion 3 and 3.5: joint attention over image and text rows (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from cat_pruning.errors import SettingsError
from cat_pruning.families.attention import intercept_attention
from cat_pruning.families.configs import SD3Config
from cat_pruning.families.family import Modulation, PatchFamily
from cat_pruning.families.interception import TokenReuse
from cat_pruning.families.residuals import residual_list, without_residuals
from cat_pruning.step_io import LATENTS, TIMESTEP, CacheRows, CacheSpec, Shape, StepDims, residual_names

T5_LENGTH = 256  # StableDiffusion3Pipeline's default max_sequence_length
T5_MOST = 512  # its largest
LAYER_GATES = "layer_gates"


class StableDiffusion3(PatchFamily):
    """Every SD3Transformer2DModel.

    Skip-layer guidance calls the model without some of its blocks. A block whose gates are zero adds nothing, so
    `layer_gates`, one factor per block, makes that a matter of inputs: the same graph serves such calls, and since the
    gates depend on the timestep only, the product is not even in the step.
    """

    name = "sd3"
    transformer_class = "SD3Transformer2DModel"
    timestep_inputs = (TIMESTEP, "pooled_projections", LAYER_GATES)
    prompt_inputs = ("encoder_hidden_states",)
    lora_loader = "SD3LoraLoaderMixin"
    residual_arguments = ("block_controlnet_hidden_states",)
    config_model = SD3Config

    @override
    def intercept(self, transformer: Any, reuse: TokenReuse) -> None:
        transformer.pos_embed.register_forward_hook(lambda module, args, tokens: reuse.gather(tokens))
        transformer.proj_out.register_forward_hook(lambda module, args, rows: reuse.merge(rows))
        for index, block in enumerate(transformer.transformer_blocks):
            if not reuse.modulated_ahead:
                block.norm1.register_forward_hook(_gated(reuse, index))
                if not block.context_pre_only:
                    block.norm1_context.register_forward_hook(_gated(reuse, index))
            intercept_attention(block.attn, reuse, CacheRows.JOINT)
            if block.use_dual_attention:
                intercept_attention(block.attn2, reuse, CacheRows.IMAGE)

    @override
    def modulations(self, transformer: Any) -> list[Modulation]:
        found = []
        for layer, block in enumerate(transformer.transformer_blocks):
            factor = (LAYER_GATES, layer)
            has_gates = not block.context_pre_only
            found += [Modulation(block.norm1, factor), Modulation(block.norm1_context, factor if has_gates else None)]
        return [*found, Modulation(transformer.norm_out)]

    @override
    def timestep_embedding(self, embed: Any, model_inputs: Mapping[str, Tensor]) -> Tensor:
        embedding: Tensor = embed(model_inputs[TIMESTEP], model_inputs["pooled_projections"])
        return embedding

    @override
    def forward_kwargs(self, model_inputs: dict[str, Tensor]) -> dict[str, Any]:
        own = {name: tensor for name, tensor in without_residuals(model_inputs).items() if name != LAYER_GATES}
        residuals = [model_inputs[name] for name in residual_names(self.num_residuals) if name in model_inputs]
        if not residuals:
            return own
        return {
            **own,
            "block_controlnet_hidden_states": [*residuals, residuals[-1]],
        }  # one a block; the last reads none

    @override
    def caches(self) -> list[CacheSpec]:
        width = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        specs = []
        for layer in range(self.config["num_layers"]):
            specs.append(CacheSpec(CacheRows.JOINT, width))
            if layer in self.config["dual_attention_layers"]:
                specs.append(CacheSpec(CacheRows.IMAGE, width))
        return specs

    @override
    def text_length(self, model_inputs: Mapping[str, Tensor]) -> int:
        return model_inputs["encoder_hidden_states"].shape[1]

    @override
    def input_shapes(self, dims: StepDims) -> dict[str, Shape]:
        return {
            LATENTS: (dims.batch, self.config["in_channels"], dims.latent_height, dims.latent_width),
            TIMESTEP: (dims.batch,),
            "encoder_hidden_states": (dims.batch, dims.text_length, self.config["joint_attention_dim"]),
            "pooled_projections": (dims.batch, self.config["pooled_projection_dim"]),
            LAYER_GATES: (self.config["num_layers"],),
        }

    @override
    def argument_names(self) -> tuple[str, ...]:
        return ("encoder_hidden_states", "pooled_projections")

    @override
    def conditioning(self, arguments: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
        return {**arguments, LAYER_GATES: torch.ones(self.config["num_layers"])}

    @property
    @override
    def num_residuals(self) -> int:
        """All blocks but the last."""
        return int(self.config["num_layers"]) - 1

    @override
    def residuals(self, arguments: Mapping[str, Any]) -> list[Tensor | None]:
        """As SD3Transformer2DModel spreads them."""
        (name,) = self.residual_arguments
        if not (given := residual_list(arguments, name)):
            return []
        interval = self.config["num_layers"] / len(given)
        return [given[int(block / interval)] for block in range(self.num_residuals)]

    @override
    def without_layers(self, conditioning: Mapping[str, Tensor], layers: tuple[int, ...]) -> dict[str, Tensor]:
        num_layers = self.config["num_layers"]
        if outside := [layer for layer in layers if not 0 <= layer < num_layers]:
            raise SettingsError(f"skip_layers {outside}: the model has blocks 0 to {num_layers - 1}")
        gates = torch.tensor([0.0 if layer in layers else 1.0 for layer in range(num_layers)])
        return {**conditioning, LAYER_GATES: gates.to(conditioning[LAYER_GATES])}

    @override
    def skips_layers(self, model_inputs: Mapping[str, Tensor]) -> bool:
        return not bool((model_inputs[LAYER_GATES] == 1).all())

    @override
    def with_image_rows(self, outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """A block returns the text's rows, then the image's."""
        text, image = outputs
        return text, change(image)

    @override
    def pipeline_text_length(self, directory: Path) -> int:
        """CLIP's tokens, then T5's, or as many empty ones where there is no T5."""
        return self.tokenizer_length(directory / "tokenizer") + T5_LENGTH

    @override
    def pipeline_text_lengths(self, directory: Path) -> range:
        """CLIP's tokens, and at least one of T5's."""
        tokens = self.tokenizer_length(directory / "tokenizer")
        return range(tokens + 1, tokens + T5_MOST + 1)

    @override
    def pipeline_arguments(self, pipeline: Any, text_length: int) -> dict[str, Any]:
        return {"max_sequence_length": text_length - pipeline.tokenizer_max_length}

    @property
    @override
    def max_latent_size(self) -> int | None:
        return int(self.config["pos_embed_max_size"] * self.config["patch_size"])


def _gated(reuse: TokenReuse, layer: int) -> Any:
    """A hook on a block's adaptive norm: its gates times the block's `layer_gates`.

    AdaLayerNormZero and SD35AdaLayerNormZeroX return the normed rows, gate, shift, scale, gate and, with dual
    attention, normed rows and gate again.
    """

    def hook(module: Any, arguments: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        factor = reuse.inputs[LAYER_GATES][layer]
        gates = {1, 4, 6}
        return tuple(output * factor if index in gates else output for index, output in enumerate(outputs))

    return hook
