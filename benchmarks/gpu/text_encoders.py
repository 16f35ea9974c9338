"""SD3's text encoders and autoencoder at their published sizes, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.case import fill_on
from gpu.setting import Setting

# As in the checkpoint's text_encoder, text_encoder_2, text_encoder_3 and vae.
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
CLIP_BOTH = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_LENGTH, T5_LENGTH = 77, 256
# At sizes for a machine without a GPU; what the tiny transformer takes.
_TINY_CLIP = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
TINY_CLIPS = ({**_TINY_CLIP, "projection_dim": 8}, {**_TINY_CLIP, "projection_dim": 12})
TINY_T5 = {"vocab_size": 50, "d_model": 24, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
TINY_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 128}
TINY_LENGTHS = (3, 4)


@dataclass(frozen=True)
class Embeddings:
    """A prompt as the pipeline takes it."""

    rows: Tensor  # (1, T, width)
    pooled: Tensor  # (1, width)


class TextEncoders:
    """CLIP-L, CLIP-bigG and T5-XXL, and prompts of random tokens for them: there are no tokenizers offline."""

    def __init__(self, setting: Setting) -> None:
        import accelerate
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

        tiny = setting.tiny
        vocabulary = {"vocab_size": 50} if tiny else {}
        clips = zip((CLIP_L, CLIP_G), TINY_CLIPS, strict=True)
        self.clip_length, self.t5_length = TINY_LENGTHS if tiny else (CLIP_LENGTH, T5_LENGTH)
        self.clips: list[Any] = []
        with accelerate.init_empty_weights(include_buffers=False):
            for config, small in clips:
                sizes = {**CLIP_BOTH, **config, **(small if tiny else {}), **vocabulary}
                self.clips.append(CLIPTextModelWithProjection(CLIPTextConfig(**sizes)))
            t5_sizes = {**T5_XXL, **(TINY_T5 if tiny else {})}
            self.t5: Any = T5EncoderModel(T5Config(**t5_sizes, use_cache=False))
        self.t5.set_input_embeddings(self.t5.shared)  # the encoder's too, which came apart
        for module in (*self.clips, self.t5):
            fill_on(setting.device, setting.dtype, module)
        self._setting = setting

    def tokens(self, seed: int) -> tuple[Tensor, Tensor]:
        """A prompt: for CLIP (1, 77), for T5 (1, 256)."""
        device = self._setting.device
        generator = torch.Generator(device).manual_seed(seed)
        lengths = ((self.clips[0].config.vocab_size, self.clip_length), (self.t5.config.vocab_size, self.t5_length))
        clip, t5 = (torch.randint(3, size, (1, length), generator=generator, device=device) for size, length in lengths)
        return clip, t5

    @torch.no_grad()
    def encode(self, seed: int) -> Embeddings:
        """A prompt of random tokens: what StableDiffusion3Pipeline.encode_prompt makes of it."""
        clip_tokens, t5_tokens = self.tokens(seed)
        encoded = [clip(clip_tokens, output_hidden_states=True) for clip in self.clips]
        rows = torch.cat([each.hidden_states[-2] for each in encoded], dim=-1)
        text = self.t5(t5_tokens)[0]
        rows = torch.nn.functional.pad(rows, (0, text.shape[-1] - rows.shape[-1]))
        return Embeddings(torch.cat([rows, text], dim=-2), torch.cat([each[0] for each in encoded], dim=-1))


def random_vae(setting: Setting) -> Any:
    """The autoencoder."""
    import accelerate
    import diffusers

    with accelerate.init_empty_weights(include_buffers=False):
        vae = diffusers.AutoencoderKL(**{**VAE, **(TINY_VAE if setting.tiny else {})})
    return fill_on(setting.device, setting.dtype, vae)
