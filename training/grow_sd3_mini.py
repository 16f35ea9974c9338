"""Make a beginning for sd3-mini-256 out of sd3-mini: more words, longer captions, larger images.

    python training/grow_sd3_mini.py models/sd3-mini build/grown-128 --side 128
    python training/grow_sd3_mini.py build/rich-128/sd3-mini-256 build/grown-256 --side 256

What is known stays: words keep their embeddings, captions their first places, and the position embedding is stretched
over the larger image, so that a token finds itself in the same part of the picture as before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from cat_pruning.models import rich_scenes, scenes
from mini_models import VAE_FACTOR, quiet_libraries
from mini_sd3 import Sd3Denoiser, Sd3Mini256, new_text_encoder

PATCH = 2
# sd3-mini's positions: 16 tokens, half a position apart from 4 on, the middle of a table of 32.
FIRST_POSITION, POSITIONS = 4.0, 8.0


def grow(source: Path, out: Path, side: int) -> None:
    """Write a pipeline of `side` pixels with what the one in `source` knows.

    Args:
        source: sd3-mini, or a pipeline that this made of it.
        out: the folder to write; replaced if there is one.
        side: the images' new side in pixels; a multiple of 8.

    Raises:
        FileNotFoundError: there is no pipeline in `source`.
        ValueError: the side is no multiple of 8.
    """
    if side % (PATCH * VAE_FACTOR):
        raise ValueError(f"side={side}: expected a multiple of {PATCH * VAE_FACTOR}")
    miniature = Sd3Mini256()
    pipeline: StableDiffusion3Pipeline = miniature.load_pipeline(source)
    tokenizer = miniature.new_tokenizer(sorted({*scenes.vocabulary(), *rich_scenes.vocabulary()}))
    torch.manual_seed(0)
    known = pipeline.text_encoder, pipeline.text_encoder_2
    encoders = [with_words(encoder, pipeline.tokenizer, tokenizer) for encoder in known]
    denoiser = Sd3Denoiser(with_side(pipeline.transformer, side), *encoders)
    pipeline.vae.register_to_config(sample_size=side)
    miniature.save_pipeline(out, denoiser, pipeline.vae, tokenizer)


def with_words(
    encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, larger: CLIPTokenizer
) -> CLIPTextModelWithProjection:
    """The text encoder for another tokenizer: tokens of the same name and the first positions keep their embeddings.

    A new token's embedding is random, of the known ones' deviation. New positions repeat the known ones.
    """
    size = Sd3Mini256.size
    grown = new_text_encoder(size, encoder.config.num_hidden_layers, larger)
    state = encoder.state_dict()
    words, positions = (f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position"))
    known = tokenizer.get_vocab()
    table = torch.randn(len(larger), size.text_width) * state[words].std()
    for token, index in larger.get_vocab().items():
        if token in known:
            table[index] = state[words][known[token]]
    repeats = -(-larger.model_max_length // len(state[positions]))
    longer = state[positions].repeat(repeats, 1)[: larger.model_max_length]
    grown.load_state_dict({**state, words: table, positions: longer}, strict=False)
    return grown


def with_side(transformer: SD3Transformer2DModel, side: int) -> SD3Transformer2DModel:
    """The transformer for images of another side, its position embedding stretched over them."""
    tokens = side // (PATCH * VAE_FACTOR)
    config = {**transformer.config, "sample_size": side // VAE_FACTOR, "pos_embed_max_size": tokens}
    grown: SD3Transformer2DModel = SD3Transformer2DModel.from_config(config)
    table = stretched_positions(tokens, grown.inner_dim)
    grown.load_state_dict({**transformer.state_dict(), "pos_embed.pos_embed": table})
    return grown


def stretched_positions(tokens: int, width: int) -> Tensor:
    """SD3's sine and cosine table, (1, tokens², width), of `tokens` per side spread over sd3-mini's picture.

    The middle of a token lies where sd3-mini sees the same part of the picture: with half of its tokens' size, halfway
    between two of its positions and a quarter to either side.
    """
    spacing = POSITIONS / tokens
    first = FIRST_POSITION + spacing / 2 - POSITIONS / 16 / 2
    along = first + spacing * torch.arange(tokens, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(along, along, indexing="xy"))  # (2, tokens, tokens), x first as diffusers has it
    table: Tensor = get_2d_sincos_pos_embed_from_grid(width, grid[:, None], output_type="pt")
    return table.float()[None]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="sd3-mini, or a pipeline that this made of it")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--side", type=int, required=True, help="of the images, in pixels")
    options = parser.parse_args(arguments)
    grow(options.source, options.out, options.side)


if __name__ == "__main__":
    quiet_libraries()
    main()
