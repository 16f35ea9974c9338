"""sd3-mini: the classes of Stable Diffusion 3, in miniature.

A byte-pair tokenizer with one token for each word of the captions; two CLIP text encoders and
empty tokens in T5's place; a transformer of joint blocks; flow matching.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from mini_models import TEXT_LENGTH, VAE_FACTOR, Miniature, ModelSize, half_copy
from scene_kinds import SceneKind


class Sd3Denoiser(nn.Module):
    """The transformer and both text encoders: captions and noised latents to the flow's velocity."""

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def forward(self, noisy_latents: Tensor, sigmas: Tensor, input_ids: Tensor) -> Tensor:
        """Velocity, (B, C, h, w), from latents (B, C, h, w), sigmas (B,) in (0, 1) and token ids (B, T)."""
        encoded = [model(input_ids, output_hidden_states=True) for model in (self.text_encoder, self.text_encoder_2)]
        hidden_states = torch.cat([each.hidden_states[-2] for each in encoded], dim=-1)  # (B, T, D)
        # What the pipeline puts in the place of T5's tokens where there is no T5.
        empty = hidden_states.new_zeros(len(hidden_states), TEXT_LENGTH, hidden_states.shape[-1])
        hidden_states = torch.cat([hidden_states, empty], dim=1)  # (B, T + 24, D)
        return self.transformer(
            noisy_latents,
            encoder_hidden_states=hidden_states,
            pooled_projections=torch.cat([each.text_embeds for each in encoded], dim=-1),
            timestep=sigmas * 1000,
            return_dict=False,
        )[0]


class Sd3Mini(Miniature):
    """Stable Diffusion 3's miniature."""

    name = "sd3-mini"
    pipeline_class = StableDiffusion3Pipeline
    size = ModelSize()
    load_options = {"text_encoder_3": None, "tokenizer_3": None}  # noqa: RUF012
    call_options = {"max_sequence_length": TEXT_LENGTH}  # noqa: RUF012
    guidance = 3.0
    latents_are_shifted = True

    def new_tokenizer(self, words: list[str]) -> CLIPTokenizer:
        """CLIP's tokenizer with the smallest set of merges that makes every word one token."""
        letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz"))
        vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
        merges: list[tuple[str, str]] = []
        while any(len(_bpe(word, merges)) > 1 for word in words):
            for word in words:
                while len(symbols := _bpe(word, merges)) > 1:
                    merges.append((symbols[0], symbols[1]))
                    if (merged := symbols[0] + symbols[1]) not in vocabulary:
                        vocabulary.append(merged)
        vocabulary += ["<|startoftext|>", "<|endoftext|>"]
        with tempfile.TemporaryDirectory() as folder:
            vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
            vocab_file.write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
            merges_file.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
            return CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=self.text_length)

    def new_denoiser(self, size: ModelSize, tokenizer: CLIPTokenizer) -> Sd3Denoiser:
        """An untrained denoiser that predicts zero: adaptive norms and output start at zero, as in DiT."""
        transformer = SD3Transformer2DModel(
            sample_size=size.side // VAE_FACTOR,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=size.num_layers,
            attention_head_dim=size.width // size.num_heads,
            num_attention_heads=size.num_heads,
            joint_attention_dim=2 * size.text_width,
            caption_projection_dim=size.width,
            pooled_projection_dim=2 * size.text_width,
            pos_embed_max_size=size.side // VAE_FACTOR,
        )
        for block in transformer.transformer_blocks:
            for linear in (block.norm1.linear, block.norm1_context.linear):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        nn.init.zeros_(transformer.proj_out.weight)
        nn.init.zeros_(transformer.proj_out.bias)
        return Sd3Denoiser(transformer, *(new_text_encoder(size, layers, tokenizer) for layers in size.text_layers))

    def denoiser_of(self, pipeline: StableDiffusion3Pipeline) -> Sd3Denoiser:
        """The transformer and both text encoders of the pipeline."""
        return Sd3Denoiser(pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)

    def new_pipeline(
        self, denoiser: Sd3Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer
    ) -> StableDiffusion3Pipeline:
        """The pipeline of copies of the models in fp16, without T5."""
        return StableDiffusion3Pipeline(
            transformer=half_copy(denoiser.transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=half_copy(vae),
            text_encoder=half_copy(denoiser.text_encoder),
            tokenizer=tokenizer,
            text_encoder_2=half_copy(denoiser.text_encoder_2),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )

    def loss(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        input_ids: Tensor,
        generator: torch.Generator,
        sigma_shift: float = 1.0,
    ) -> Tensor:
        """Squared error of the predicted velocity, at logit-normal sigmas, shifted."""
        # The same as `shift * sigma / (1 + (shift - 1) * sigma)`, what a scheduler's `shift` does.
        sigmas = torch.sigmoid(
            torch.randn(len(latents), generator=generator, device=latents.device) + math.log(sigma_shift)
        )
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        weight = sigmas[:, None, None, None]
        velocity = denoiser((1 - weight) * latents + weight * noise, sigmas, input_ids)
        return functional.mse_loss(velocity.float(), noise - latents)


class Sd3Mini256(Sd3Mini):
    """Stable Diffusion 3's miniature at 256x256, of rich scenes."""

    name = "sd3-mini-256"
    size = ModelSize(side=256)
    scenes = SceneKind.RICH
    text_length = 48


def _bpe(word: str, merges: list[tuple[str, str]]) -> list[str]:
    symbols = [*word[:-1], f"{word[-1]}</w>"]
    while True:
        pairs = list(itertools.pairwise(symbols))
        ranks = [(merges.index(pair), position) for position, pair in enumerate(pairs) if pair in merges]
        if not ranks:
            return symbols
        _, k = min(ranks)
        symbols = [*symbols[:k], symbols[k] + symbols[k + 1], *symbols[k + 2 :]]


def new_text_encoder(size: ModelSize, num_layers: int, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """An untrained text encoder of one of `size.text_layers`, for captions as long as the tokenizer allows."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.text_width,
            intermediate_size=4 * size.text_width,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=size.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            hidden_act="quick_gelu",
        )
    )
