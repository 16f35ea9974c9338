"""What every training shares: rounds of scenes, pixels, latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from scene_kinds import SceneKind

ENCODE_BATCH = 64


def sample_round(
    seed: int, index: int, count: int, side: int, kind: SceneKind = SceneKind.FLAT, things: tuple[int, ...] = ()
) -> tuple[NDArray[np.uint8], list[str]]:
    """Round `index` of the data set: `count` fresh images (count, side, side, 3) and their captions.

    Captions that are held out for the evaluation do not occur. `things` are the numbers of things that a rich scene may
    have, if not its kind's own.
    """
    rng = np.random.default_rng((seed, index))
    drawn, numbers = kind.module, [things] if things else []
    scenes: list[Any] = []
    while len(scenes) < count:
        if not drawn.is_held_out(scene := drawn.sample_scene(rng, *numbers)):
            scenes.append(scene)
    return np.stack([drawn.render(scene, side, rng) for scene in scenes]), [scene.caption for scene in scenes]


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (B, H, W, 3) as the autoencoder takes them: (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> NDArray[np.uint8]:
    """The inverse of `to_pixels`, clipped and rounded."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def encode_round(vae: AutoencoderKL, images: NDArray[np.uint8]) -> Tensor:
    """The images' latents as the pipeline expects them, (B, C, h, w): shifted, if the VAE says so, and scaled."""
    batches = to_pixels(images).split(ENCODE_BATCH)
    latents = torch.cat([vae.encode(batch.to(vae.device)).latent_dist.mode() for batch in batches])
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
