"""The settings of a training run: one frozen dataclass, validated once, and the learning rate that follows from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from mini_models import ModelSize

LR_FLOOR = 0.02  # of the peak, where the cosine ends


class Precision(StrEnum):
    """The dtype that the denoiser computes in; its weights are fp32 either way."""

    FP32 = "fp32"
    BF16 = "bf16"  # faster on processors with avx512_bf16 or AMX, more than ten times slower on others


class Optimizer(StrEnum):
    """The optimizer of the denoiser."""

    ADAMW = "adamw"
    MUON = "muon"  # for the matrices of the layers; AdamW for the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run.

    The ones that matter:
        out: the folder of the run.
        miniature: a key of `MINIATURES`.
        init: a pipeline to continue from: transformer, text encoders, and the autoencoder unless `vae` is given.
        vae: an autoencoder, in the place of `init`'s or of one that is trained for a new miniature.
        steps: optimizer steps. Exactly one of `steps` and `seconds`.
        seconds: time on `threads` processors, by the process's own clock, which stands still while the run is paused.

    The ones to tinker with:
        batch_size: images of a step.
        side: of the images to train on, if not the miniature's own: half the side costs a quarter.
        things: numbers of things of a rich scene, one of which each has; empty for four to six.
        peak_lr: learning rate after `warmup_steps`, from where a cosine leads to nearly zero.
        ema_decay: of the average of the weights that is saved.
        caption_dropout: share of the captions replaced by the empty one, for guidance.
        round_scenes: fresh scenes drawn and encoded at a time.
        round_epochs: how many times each round is used.
        autoencoder_steps: for a new autoencoder.
        optimizer: of the denoiser.
        sigma_shift: of sd3-mini's sigmas toward noise, as a scheduler's `shift`: 1 leaves them as they are.
        checkpoint_every_s: seconds by the clock on the wall.
        precision: the dtype that the denoiser computes in.
        threads: of torch.
        device: of torch. The noise of a step is another one on another kind of device.
        workers: processes that draw the scenes of the rounds to come; 0 draws each when it is needed.
        seed: of everything random.
        size: of a new miniature.

    Raises:
        ValueError: not exactly one budget, or a number outside its domain.
    """

    out: Path
    miniature: str = "sd3-mini"
    init: Path | None = None
    vae: Path | None = None
    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 32
    side: int | None = None
    things: tuple[int, ...] = ()
    peak_lr: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.9995
    caption_dropout: float = 0.1
    round_scenes: int = 1024
    round_epochs: int = 4
    autoencoder_steps: int = 4000
    optimizer: Optimizer = Optimizer.ADAMW
    sigma_shift: float = 1.0
    checkpoint_every_s: float = 300.0
    precision: Precision = Precision.FP32
    threads: int = 2
    device: str = "cpu"
    workers: int = 0
    seed: int = 0
    size: ModelSize = field(default_factory=ModelSize)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(f"steps={self.steps}, seconds={self.seconds}: expected exactly one of them")
        if self.sigma_shift <= 0 or (self.sigma_shift != 1.0 and not self.miniature.startswith("sd3-mini")):
            raise ValueError(f"sigma_shift={self.sigma_shift}: expected a positive number; 1 but for sd3-mini")
        if not 1 <= self.batch_size <= self.round_scenes:
            raise ValueError(f"batch_size={self.batch_size}: expected 1 to round_scenes={self.round_scenes}")

    @property
    def steps_per_epoch(self) -> int:
        """Steps from one pass over a round's scenes; what is left over waits for the next pass."""
        return self.round_scenes // self.batch_size

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a checkpoint must share with the run that resumes it: all but the budget and the folder."""
        free = {
            "out",
            "init",
            "vae",
            "steps",
            "seconds",
            "checkpoint_every_s",
            "threads",
            "device",
            "workers",
            "precision",
        }
        settings = {key: value for key, value in dataclasses.asdict(self).items() if key not in free}
        return {**settings, "optimizer": str(self.optimizer)}  # an enum would not load with weights_only

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is used, in [0, 1]."""
        used = step / self.steps if self.steps is not None else seconds / self.seconds
        return min(1.0, used)

    def learning_rate(self, step: int, seconds: float) -> float:
        """Linear warmup times a cosine over the budget."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress(step, seconds)))
        return self.peak_lr * min(1.0, (step + 1) / self.warmup_steps) * (LR_FLOOR + (1 - LR_FLOOR) * cosine)

    def ema_weight(self, step: int) -> float:
        """The average's decay after `step` steps; a new model's first weights are forgotten sooner."""
        return self.ema_decay if self.init else min(self.ema_decay, (1 + step) / (20 + step))
