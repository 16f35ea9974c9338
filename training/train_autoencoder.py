"""Train the miniatures' autoencoder, or continue an existing one; a killed run resumes with the same command.

    python training/train_autoencoder.py build/autoencoder --init models/sd3-mini/vae --steps 2500

Writes into the folder: `autoencoder.pt` every few minutes and on SIGTERM, `vae/` at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from mini_models import ModelSize, new_autoencoder, quiet_libraries, sigterm_requests
from mini_stages import encode_round, sample_round, to_pixels
from scene_kinds import SceneKind

logger = logging.getLogger("train_autoencoder")

BATCH = 8
SCENES = 1024  # of a round
ROUND_EPOCHS = 4
WARMUP_STEPS = 50
LR_FLOOR = 0.02  # of the peak, where the decay ends
EDGE_WEIGHT = 0.5
KL_WEIGHT = 1e-5  # only keeps the latents finite
LOG_EVERY = 100  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderConfig:
    """The training of an autoencoder.

    Attributes:
        out: the folder of the run.
        init: an autoencoder to continue; without it, a new one.
        steps: of `BATCH` images.
        peak_lr: learning rate after the warmup, from where it falls linearly to nearly zero.
        checkpoint_every_s: seconds by the clock on the wall.
        threads: of torch.
        seed: of everything random.
        scenes: what the images show.
        size: the images'.
    """

    out: Path
    init: Path | None = None
    steps: int = 3500
    peak_lr: float = 2e-3
    checkpoint_every_s: float = 300.0
    threads: int = 2
    seed: int = 0
    scenes: SceneKind = SceneKind.FLAT
    size: ModelSize = field(default_factory=ModelSize)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: expected at least 1")

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a checkpoint must share with the run that resumes it: all but the budget and the folder."""
        free = {"out", "init", "steps", "checkpoint_every_s", "threads"}
        settings = {key: value for key, value in dataclasses.asdict(self).items() if key not in free}
        return {**settings, "scenes": str(self.scenes)}  # an enum would not load with weights_only

    def learning_rate(self, step: int) -> float:
        """Linear warmup times a linear decay over the budget."""
        decay = LR_FLOOR + (1 - LR_FLOOR) * (1 - step / self.steps)
        return self.peak_lr * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def trained_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """The autoencoder in `vae/` of the run's folder; if there is none, trains one, and writes it there.

    Raises:
        ValueError: the folder's checkpoint belongs to a run with other settings.
        InterruptedError: SIGTERM came; the checkpoint is written.
    """
    folder = config.out / "vae"
    if (folder / "config.json").exists():
        return AutoencoderKL.from_pretrained(str(folder)).eval()
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    vae = new_autoencoder(config.size) if config.init is None else AutoencoderKL.from_pretrained(str(config.init))
    _fit(vae.float().train(), config)
    vae.eval()
    latents = _latent_statistics(vae, config)
    vae.register_to_config(**latents)
    staging = folder.with_name(f".{folder.name}.new")
    vae.save_pretrained(str(staging))
    staging.rename(folder)
    return vae


def reconstruction_loss(restored: Tensor, pixels: Tensor) -> Tensor:
    """L1 of the pixels (B, 3, H, W), and of the differences between neighbours, which blurred edges make wrong."""
    loss = functional.l1_loss(restored, pixels)
    for dim in (-1, -2):
        loss = loss + EDGE_WEIGHT * functional.l1_loss(restored.diff(dim=dim), pixels.diff(dim=dim))
    return loss


def _fit(vae: AutoencoderKL, config: AutoencoderConfig) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    file = config.out / "autoencoder.pt"
    first = _resume(file, vae, optimizer, config)
    saved_at = time.monotonic()
    index, images = -1, torch.empty(0)
    with sigterm_requests() as terminated:
        for step in range(first, config.steps):
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            # The denoiser's training draws its rounds with the seed itself, so this one takes the next seed.
            if step * BATCH // (SCENES * ROUND_EPOCHS) != index:
                index = step * BATCH // (SCENES * ROUND_EPOCHS)
                count = min(SCENES, BATCH * config.steps)
                drawn, _ = sample_round(config.seed + 1, index, count, config.size.side, config.scenes)
                images = torch.from_numpy(drawn)
            picked = torch.randint(len(images), (BATCH,), generator=generator)
            pixels = to_pixels(images[picked].numpy())
            posterior = vae.encode(pixels).latent_dist
            restored = vae.decode(posterior.sample(generator)).sample
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            loss = reconstruction_loss(restored, pixels) + KL_WEIGHT * kl
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(step)
            optimizer.step()
            if step % LOG_EVERY == 0 or step == config.steps - 1:
                psnr = 10 * math.log10(4 / functional.mse_loss(restored, pixels).item())
                logger.info("autoencoder step %d: loss %.4f, %.1f dB", step, loss.item(), psnr)
            if terminated or time.monotonic() - saved_at > config.checkpoint_every_s:
                _save(file, step + 1, vae, optimizer, config)
                saved_at = time.monotonic()
            if terminated:
                raise InterruptedError(f"terminated at step {step + 1}; the same command resumes")
    _save(file, config.steps, vae, optimizer, config)


def _save(
    file: Path, step: int, vae: AutoencoderKL, optimizer: torch.optim.Optimizer, config: AutoencoderConfig
) -> None:
    staging = file.with_name(f".{file.name}.new")
    state = {"identity": config.identity, "step": step, "vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, staging)
    staging.replace(file)


def _resume(file: Path, vae: AutoencoderKL, optimizer: torch.optim.Optimizer, config: AutoencoderConfig) -> int:
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    if state["identity"] != config.identity:
        raise ValueError(f"{file} has {state['identity']}, not {config.identity}; use another folder")
    vae.load_state_dict(state["vae"])
    optimizer.load_state_dict(state["optimizer"])
    step = int(state["step"])
    logger.info("autoencoder resumed at step %d", step)
    return step


def _latent_statistics(vae: AutoencoderKL, config: AutoencoderConfig) -> dict[str, float]:
    """The shift and the scale that bring the latents to mean 0 and deviation 1."""
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    images, _ = sample_round(config.seed + 1, 0, SCENES, config.size.side, config.scenes)
    latents = encode_round(vae, images)
    return {"scaling_factor": 1 / latents.std().item(), "shift_factor": latents.mean().item()}


def configuration(arguments: list[str] | None = None) -> AutoencoderConfig:
    """The command line as a config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--init", type=Path, help="autoencoder to continue")
    for name in ("steps", "peak_lr", "checkpoint_every_s", "threads", "seed"):
        default = AutoencoderConfig.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{default}")
    parser.add_argument("--scenes", type=SceneKind, choices=list(SceneKind), default=SceneKind.FLAT)
    return AutoencoderConfig(**vars(parser.parse_args(arguments)))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    trained_autoencoder(configuration(arguments))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    quiet_libraries()
    main()
