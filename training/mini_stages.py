"""The stages before the denoiser's training: scenes drawn in rounds, the autoencoder, the latents."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mini_models import ModelSize, new_autoencoder
from scenes import Scene, is_held_out, render, sample_scene

logger = logging.getLogger(__name__)

ENCODE_BATCH = 64
AUTOENCODER_BATCH = 12
AUTOENCODER_SCENES = 8192
AUTOENCODER_LR = 2e-3
KL_WEIGHT = 1e-4  # keeps the latents finite, no more


def sample_round(seed: int, index: int, count: int, side: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Round `index` of the data set: `count` fresh images (count, side, side, 3) and their captions.

    Captions that are held out for the evaluation do not occur.
    """
    rng = np.random.default_rng((seed, index))
    scenes: list[Scene] = []
    while len(scenes) < count:
        if not is_held_out(scene := sample_scene(rng)):
            scenes.append(scene)
    return np.stack([render(scene, side, rng) for scene in scenes]), [scene.caption for scene in scenes]


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
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in batches])
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def trained_autoencoder(folder: Path, size: ModelSize, steps: int, seed: int) -> AutoencoderKL:
    """The autoencoder in `folder`; if there is none, trains one and writes it there.

    This stage begins anew when it is killed; it takes a quarter of an hour.
    """
    if (folder / "config.json").exists():
        return AutoencoderKL.from_pretrained(str(folder)).eval()
    # Rounds of training count from 0, so that round -1 would be out of numpy's domain: another seed instead.
    images, _ = sample_round(seed + 1, 0, min(AUTOENCODER_SCENES, AUTOENCODER_BATCH * steps), size.side)
    vae = new_autoencoder(size)
    _fit(vae, images, steps, torch.Generator().manual_seed(seed))
    vae.eval()
    latents = encode_round(vae, images)
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    staging = folder.with_name(f".{folder.name}.new")
    vae.save_pretrained(str(staging))
    staging.rename(folder)
    return vae


def _fit(vae: AutoencoderKL, images: NDArray[np.uint8], steps: int, generator: torch.Generator) -> None:
    """Fit images with L1, a little L2 and a trace of KL."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=AUTOENCODER_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, AUTOENCODER_LR, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        picked = torch.randint(len(images), (AUTOENCODER_BATCH,), generator=generator)
        pixels = to_pixels(images[picked.numpy()])
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(posterior.sample(generator)).sample
        error = functional.mse_loss(restored, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = functional.l1_loss(restored, pixels) + 0.5 * error + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            logger.info("autoencoder step %d: %.1f dB", step, 10 * math.log10(4 / error.item()))
