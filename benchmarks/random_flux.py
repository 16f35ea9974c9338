"""A small FLUX pipeline with random weights, in the diffusers layout: for what needs FLUX's classes and no picture.

    python benchmarks/random_flux.py build/random-flux
    cat-export --model build/random-flux --target onnx --out build/eval/random-flux

The text encoders, tokenizers and autoencoder are those of the packaged miniatures, the transformer is new: its outputs
depend on latents, timestep and prompt as its random weights have it, and show nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from cat_pruning.models import miniatures

STD = 0.05  # of the weights
HEADS, HEAD_DIM = 6, 32


def main() -> None:
    """Write the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory")
    pipeline = random_flux()
    pipeline.save_pretrained(str(parser.parse_args().out))


def random_flux(seed: int = 0) -> FluxPipeline:
    """FLUX.1-dev's classes: 3 double and 6 single blocks of width 192, 16 latent channels as patches of 2x2 of 4."""
    sd3, pixart = miniatures()["sd3-mini"], miniatures()["pixart-mini"]
    text_encoder = CLIPTextModel.from_pretrained(sd3 / "text_encoder", dtype=torch.float32)
    t5 = T5EncoderModel.from_pretrained(pixart / "text_encoder", dtype=torch.float32)
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=t5.config.d_model,
        pooled_projection_dim=text_encoder.config.hidden_size,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    ).eval()
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=STD)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL.from_pretrained(sd3 / "vae", dtype=torch.float32),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(sd3 / "tokenizer"),
        text_encoder_2=t5,
        tokenizer_2=T5TokenizerFast.from_pretrained(pixart / "tokenizer"),
        transformer=transformer,
    )


if __name__ == "__main__":
    main()
