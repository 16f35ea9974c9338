"""The training of a miniature: batches, steps, checkpoints, and the command line of `train_*_mini.py`.

A run writes into its folder: `checkpoint.pt`, the pipeline `<name>-latest/` at each checkpoint, and `<name>/` at the
end.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import re
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mini_models import Miniature, quiet_libraries, sigterm_requests
from mini_stages import encode_round, sample_round
from miniatures import MINIATURES
from muon import Muon
from scene_kinds import SceneKind
from train_autoencoder import AutoencoderConfig, trained_autoencoder
from train_config import Optimizer, Precision, TrainConfig

logger = logging.getLogger("trainer")

LOG_EVERY = 25  # steps
# Options of the command line that are a number of `TrainConfig`.
NUMBERS = (
    "batch_size",
    "round_scenes",
    "peak_lr",
    "warmup_steps",
    "ema_decay",
    "sigma_shift",
    "checkpoint_every_s",
    "threads",
    "workers",
    "seed",
)
MUON_LAYERS = re.compile(r"transformer_blocks|encoder\.layers|encoder\.block")


class Run:
    """The state of a training run: what a checkpoint holds."""

    def __init__(
        self, config: TrainConfig, denoiser: nn.Module, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.config = config
        self.miniature = MINIATURES[config.miniature]
        self.device = torch.device(config.device)
        self.denoiser = denoiser.float().to(self.device).train().requires_grad_(True)
        self.average = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self.vae = vae.float().to(self.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._tokenize = copy.deepcopy(tokenizer)  # a call changes the padding that a tokenizer saves
        self.optimizers = _new_optimizers(self.denoiser, config)
        self.step = 0
        self.seconds_before = 0.0
        # A GPU's work is no time of the process.
        self._clock = time.process_time if self.device.type == "cpu" else time.monotonic
        self._clock_start = self._clock()
        self._rounds = Rounds(config, self.miniature.scenes)
        self._round: tuple[int, Tensor, Tensor] | None = None

    @property
    def seconds(self) -> float:
        """Seconds of `threads` processors used so far, by all processes of this run; on a GPU, by the clock."""
        passed = self._clock() - self._clock_start
        return self.seconds_before + (passed / self.config.threads if self.device.type == "cpu" else passed)

    def advance(self) -> float:
        """One optimizer step; returns its loss."""
        generator = torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + self.step)
        latents, input_ids = self._batch()
        dropped = torch.rand(len(input_ids), generator=generator, device=self.device) < self.config.caption_dropout
        input_ids = torch.where(dropped[:, None], self._input_ids([""]), input_ids)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision is Precision.BF16):
            loss = self.miniature.loss(self.denoiser, latents, input_ids, generator, self.config.sigma_shift)
        self.denoiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate(self.step, self.seconds)
            optimizer.step()
        self.step += 1
        decay = self.config.ema_weight(self.step)
        with torch.no_grad():
            averages, currents = list(self.average.parameters()), list(self.denoiser.parameters())
            torch._foreach_lerp_(averages, currents, 1 - decay)
        return loss.item()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all, and the averaged weights as a pipeline."""
        state = {
            "identity": self.config.identity,
            "step": self.step,
            "seconds": self.seconds,
            "denoiser": self.denoiser.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        staging = self.config.out / ".checkpoint.pt.new"
        torch.save(state, staging)
        staging.replace(self.config.out / "checkpoint.pt")
        self.export(f"{self.miniature.name}-latest")

    def export(self, name: str) -> None:
        """Write the averaged weights as the pipeline `name`."""
        self.miniature.save_pipeline(self.config.out / name, self.average, self.vae, self.tokenizer)

    def close(self) -> None:
        """End the processes that draw scenes."""
        self._rounds.close()

    def resume(self) -> bool:
        """Take up the run's checkpoint, if there is one.

        Raises:
            ValueError: the checkpoint belongs to a run with other settings.
        """
        file = self.config.out / "checkpoint.pt"
        if not file.exists():
            return False
        state = torch.load(file, map_location=self.device, weights_only=True)
        if state["identity"] != self.config.identity:
            raise ValueError(f"{file} has {state['identity']}, not {self.config.identity}; use another folder")
        self.denoiser.load_state_dict(state["denoiser"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds_before = state["step"], state["seconds"]
        return True

    def _batch(self) -> tuple[Tensor, Tensor]:
        """The step's latents (B, C, h, w) and token ids (B, T): a function of the seed and the step."""
        epoch, position = divmod(self.step, self.config.steps_per_epoch)
        index = epoch // self.config.round_epochs
        if self._round is None or self._round[0] != index:
            images, captions = self._rounds.drawn(index)
            self._round = index, encode_round(self.vae, images), self._input_ids(captions)
        _, latents, input_ids = self._round
        order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(self.config.seed + epoch))
        picked = order[position * self.config.batch_size :][: self.config.batch_size].to(self.device)
        return latents[picked], input_ids[picked]

    def _input_ids(self, captions: list[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": self.miniature.text_length, "return_tensors": "pt"}
        return self._tokenize(captions, **options).input_ids.to(self.device)


class Rounds:
    """The scenes of a run's rounds: drawn when they are asked for, or ahead of it by `config.workers` processes."""

    def __init__(self, config: TrainConfig, kind: SceneKind) -> None:
        self.config, self.kind = config, kind
        self._workers = ProcessPoolExecutor(config.workers, get_context("spawn")) if config.workers else None
        self._ahead: dict[int, Future[tuple[NDArray[np.uint8], list[str]]]] = {}

    def drawn(self, index: int) -> tuple[NDArray[np.uint8], list[str]]:
        """The images and captions of a round, a function of the seed and the index."""
        if self._workers is None:
            return sample_round(*self._arguments(index))
        for later in range(index, index + self.config.workers):
            if later not in self._ahead:
                self._ahead[later] = self._workers.submit(sample_round, *self._arguments(later))
        return self._ahead.pop(index).result()

    def _arguments(self, index: int) -> tuple[int, int, int, int, SceneKind, tuple[int, ...]]:
        config = self.config
        side = config.side or config.size.side
        return config.seed, index, config.round_scenes, side, self.kind, config.things

    def close(self) -> None:
        """End the processes."""
        if self._workers is not None:
            self._workers.shutdown(cancel_futures=True)


def _new_optimizers(denoiser: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW; with Muon before it for the matrices of the layers, if the config asks for it."""
    parameters = list(denoiser.named_parameters())
    matrices: list[nn.Parameter] = []
    if config.optimizer is Optimizer.MUON:
        matrices = [each for name, each in parameters if each.ndim == 2 and MUON_LAYERS.search(name)]
    taken = set(map(id, matrices))
    rest = [each for _, each in parameters if id(each) not in taken]
    adamw = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True)
    if not matrices:
        return [adamw]
    # Their steps have one size, so one learning rate serves both.
    return [Muon(matrices, lr=0.0, weight_decay=config.weight_decay), adamw]


def prepare(config: TrainConfig) -> Run:
    """The models of the run: those of `config.init`, or new ones; the autoencoder as `config.vae` says.

    Raises:
        ValueError: `config.init` makes images of another size, or `config.vae` has other latents than it knows.
    """
    miniature = MINIATURES[config.miniature]
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    config.out.mkdir(parents=True, exist_ok=True)
    if config.init is not None:
        pipeline = miniature.load_pipeline(config.init)
        # A run at another side may begin with a pipeline of either side.
        expected = config.side, config.size.side
        if (side := pipeline.transformer.config.sample_size * pipeline.vae_scale_factor) not in expected:
            raise ValueError(f"{config.init} makes images of {side} pixels; expected size.side={config.size.side}")
        vae = pipeline.vae if config.vae is None else AutoencoderKL.from_pretrained(str(config.vae))
        if (channels := vae.config.latent_channels) != pipeline.transformer.config.in_channels:
            raise ValueError(f"{config.vae} has {channels} latent channels, {config.init} takes another number")
        _drop_shift_unless_known(vae, miniature)
        return Run(config, miniature.denoiser_of(pipeline), vae, pipeline.tokenizer)
    tokenizer = miniature.new_tokenizer(miniature.scenes.module.vocabulary())
    denoiser = miniature.new_denoiser(config.size, tokenizer)
    if config.vae is None:
        vae = trained_autoencoder(
            AutoencoderConfig(
                out=config.out,
                steps=config.autoencoder_steps,
                checkpoint_every_s=config.checkpoint_every_s,
                threads=config.threads,
                seed=config.seed,
                scenes=miniature.scenes,
                size=config.size,
            )
        )
    else:
        vae = AutoencoderKL.from_pretrained(str(config.vae))
    _drop_shift_unless_known(vae, miniature)
    return Run(config, denoiser, vae, tokenizer)


def _drop_shift_unless_known(vae: AutoencoderKL, miniature: Miniature) -> None:
    if not miniature.latents_are_shifted:
        vae.register_to_config(shift_factor=None)


def train(config: TrainConfig) -> Run:
    """Train until the budget is used; resumes from the folder's checkpoint, and leaves one on SIGTERM."""
    run = prepare(config)
    with contextlib.closing(run):
        return _train(run)


def _train(run: Run) -> Run:
    config = run.config
    if run.resume():
        logger.info("resumed at step %d after %.0f s", run.step, run.seconds)
    saved_at, losses = time.monotonic(), []
    with sigterm_requests() as terminated:
        while config.progress(run.step, run.seconds) < 1.0 and not terminated:
            losses.append(run.advance())
            if run.step % LOG_EVERY == 0:
                mean = sum(losses) / len(losses)
                logger.info("step %d  loss %.4f  %.0f s of its own", run.step, mean, run.seconds)
                losses.clear()
            if time.monotonic() - saved_at > config.checkpoint_every_s:
                run.save()
                saved_at = time.monotonic()
        run.save()
    if terminated:
        logger.info("terminated at step %d; the same command resumes", run.step)
    else:
        run.export(run.miniature.name)
        logger.info("done: step %d, %s", run.step, config.out / run.miniature.name)
    return run


def parse_arguments(
    arguments: list[str] | None, *, miniature: str, description: str | None, **defaults: Any
) -> TrainConfig:
    """The command line as a config; `defaults` are those of the miniature where they differ from `TrainConfig`'s."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--init", type=Path, help="pipeline to continue from")
    parser.add_argument("--vae", type=Path, help="autoencoder, instead of --init's or of training one")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="optimizer steps")
    budget.add_argument("--seconds", type=float, help="active seconds on all threads")
    parser.add_argument("--side", type=int, help="of the images to train on, if not the miniature's own")
    for name in NUMBERS:
        default = defaults.get(name, TrainConfig.__dataclass_fields__[name].default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{default}")
    parser.add_argument("--things", type=_numbers, default=(), help="in a rich scene, as 1,2; default: four to six")
    parser.add_argument("--device", default="cpu", help="of torch: cpu or cuda")
    parser.add_argument("--precision", type=Precision, choices=list(Precision), default=Precision.FP32)
    parser.add_argument(
        "--optimizer", type=Optimizer, choices=list(Optimizer), default=defaults.get("optimizer", Optimizer.ADAMW)
    )
    options = vars(parser.parse_args(arguments))
    return TrainConfig(miniature=miniature, size=MINIATURES[miniature].size, **options)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def run_script(config: TrainConfig) -> None:
    """Train, with a log on the standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    quiet_libraries()
    train(config)
