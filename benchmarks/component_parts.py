"""The text encoders and autoencoders of the published models, with random weights, by the configs on the hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import accelerate
import torch
import transformers
from diffusers import AutoencoderKL
from torch import nn

_VAE: Final[dict[str, Any]] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_T5_XXL: Final[dict[str, Any]] = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
_CLIP_L: Final[dict[str, Any]] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "eos_token_id": 2,
}  # fmt: skip


def t5_xxl(num_layers: int = 24) -> nn.Module:
    """The text encoder of SD3, FLUX and PixArt, or its first layers."""
    config = transformers.T5Config(**_T5_XXL | {"num_layers": num_layers})
    module: nn.Module = transformers.T5EncoderModel._from_config(config, attn_implementation="eager")
    return module


def clip_l() -> nn.Module:
    """The first text encoder of SD3."""
    config = transformers.CLIPTextConfig(**_CLIP_L)
    module: nn.Module = transformers.CLIPTextModelWithProjection._from_config(config, attn_implementation="eager")
    return module


def vae_16_channels() -> nn.Module:
    """The autoencoder of SD3 and FLUX, which differ in their scaling alone."""
    return AutoencoderKL(**_VAE)


PARTS: Final[dict[str, tuple[str, Callable[[], nn.Module]]]] = {
    "t5-xxl": ("text_encoder_3", t5_xxl),
    "clip-l": ("text_encoder", clip_l),
    "vae": ("vae", vae_16_channels),
}


def filled(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module with random weights whose activations stay finite."""
    torch.manual_seed(seed)
    return make().eval()


def hollow(make: Callable[[], nn.Module]) -> nn.Module:
    """A module without memory for its weights."""
    with accelerate.init_empty_weights():
        return make()
