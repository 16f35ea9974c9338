"""The models of sd3-mini: the classes of Stable Diffusion 3, small enough for a laptop's processor.

A byte-pair tokenizer with one token for each word of the captions; an autoencoder with factor 4
and 4 latent channels; the `Denoiser`, which is what is trained together: the transformer and both
text encoders; and the pipeline of all of them in the diffusers layout.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

TEXT_LENGTH = 24  # tokens of the longest caption, rounded up; as many empty ones stand for T5's
VAE_FACTOR = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The sizes of a new miniature.

    Attributes:
        side: the image's side in pixels; a multiple of 8.
        width: of the transformer.
        num_layers: joint blocks of the transformer.
        num_heads: heads of its attention.
        text_width: of each text encoder.
        text_layers: layers of the first and the second text encoder.
    """

    side: int = 128
    width: int = 192
    num_layers: int = 6
    num_heads: int = 6
    text_width: int = 96
    text_layers: tuple[int, int] = (2, 3)

    def __post_init__(self) -> None:
        if self.side % (2 * VAE_FACTOR) or self.width % self.num_heads:
            raise ValueError(f"{self}: side must be a multiple of {2 * VAE_FACTOR}, width one of num_heads")


def quiet_libraries() -> None:
    """Turn off the progress bars of diffusers and transformers, which a log file cannot show."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def new_tokenizer(words: list[str]) -> CLIPTokenizer:
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
        return CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=TEXT_LENGTH)


def new_autoencoder(size: ModelSize) -> AutoencoderKL:
    """An untrained autoencoder, 0.4 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=size.side,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


class Denoiser(nn.Module):
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
        hidden_states = torch.cat([hidden_states, torch.zeros_like(hidden_states)], dim=1)  # (B, 2T, D)
        return self.transformer(
            noisy_latents,
            encoder_hidden_states=hidden_states,
            pooled_projections=torch.cat([each.text_embeds for each in encoded], dim=-1),
            timestep=sigmas * 1000,
            return_dict=False,
        )[0]


def new_denoiser(size: ModelSize, tokenizer: CLIPTokenizer) -> Denoiser:
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
    return Denoiser(transformer, *(_new_text_encoder(size, layers, tokenizer) for layers in size.text_layers))


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline in `folder` in fp32, without T5.

    Raises:
        FileNotFoundError: there is no pipeline in the folder.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder}: no model_index.json; expected a pipeline in the diffusers layout")
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        str(folder), text_encoder_3=None, tokenizer_3=None, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(folder: Path, denoiser: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
    """Write the pipeline in fp16 beside `folder`, then put it in its place; the models stay as they are."""
    staging, previous = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (staging, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline = StableDiffusion3Pipeline(
        transformer=_half_copy(denoiser.transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_half_copy(vae),
        text_encoder=_half_copy(denoiser.text_encoder),
        tokenizer=tokenizer,
        text_encoder_2=_half_copy(denoiser.text_encoder_2),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(str(staging))
    _tidy_configs(staging)
    if folder.exists():
        folder.rename(previous)
    staging.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def _bpe(word: str, merges: list[tuple[str, str]]) -> list[str]:
    symbols = [*word[:-1], f"{word[-1]}</w>"]
    while True:
        pairs = list(itertools.pairwise(symbols))
        ranks = [(merges.index(pair), position) for position, pair in enumerate(pairs) if pair in merges]
        if not ranks:
            return symbols
        _, k = min(ranks)
        symbols = [*symbols[:k], symbols[k] + symbols[k + 1], *symbols[k + 2 :]]


def _new_text_encoder(size: ModelSize, num_layers: int, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.text_width,
            intermediate_size=4 * size.text_width,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=size.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            hidden_act="quick_gelu",
        )
    )


def _half_copy(model: nn.Module) -> nn.Module:
    # A new model instead of a deep copy: of a compiled one, only the weights are wanted.
    if isinstance(model, CLIPTextModelWithProjection):
        copy = type(model)(model.config)
    else:
        copy = type(model).from_config(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.half().eval()


def _tidy_configs(folder: Path) -> None:
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(file.read_text())
        # diffusers notes where a model was loaded from: a path of the machine that trained it.
        config.pop("_name_or_path", None)
        # transformers loads in the dtype of the config, diffusers in fp32: without this, a pipeline of both cannot run.
        if "dtype" in config:
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")
