"""How a tuned schedule does where it was not fitted; `make transfer`.

    python benchmarks/transfer.py build/eval/sd3-mini --prompts 16

Schedules are fitted to scenes at guidance 3 and 128x128 pixels, and used where one of these, the kind of prompt or the
shift of the scheduler is another. The final latents are held against those of 28 full steps at that setting, as
relative errors with 95 % intervals over the prompts:

    tuned               fitted to 16 recordings: one choice of full steps, searched, and weights fitted in the loop;
                        `cat-tune` tries more choices
    forecast            by rule, of as many full steps, to the MACs
    fewer steps         as many, of Euler

At another shift of the scheduler the rows of a schedule have other sigmas, so there are more ways to go on:

    by number           the rows as they are
    by sigma            what the package does: `cat_pruning.moved_schedule`
    line                the full steps of the rows, weights of the line through the last two
    tuned there         fitted in the same way to recordings at that shift

An image-to-image run begins late. Its rows are those of its timesteps, and where one reads what was not computed the
step is full: `tuned`. The others are of as many full steps, as is

    late rows           two full steps, then the rows; those that read what was not computed have the line's weights
    late line           the same full steps, the line's weights between all of them

Written to results/transfer.json; of `--only` some settings, the others stay there as they are.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads sleep between steps

import numpy as np
import torch
from diffusers import StableDiffusion3Img2ImgPipeline
from late_rows import late
from machine import RESULTS, write_result
from PIL import Image
from torch import Tensor
from transfer_settings import BATCH, SETTINGS, WORDS, Errors, Rows, Setting, rows_of

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.evaluation.about import About
from cat_pruning.evaluation.budgets import forecast_at
from cat_pruning.evaluation.pool import LocalPool
from cat_pruning.evaluation.sweep import costs
from cat_pruning.evaluation.worker import last_latents
from cat_pruning.models.prompts import Prompt, load_prompts, tuning_prompts
from cat_pruning.models.scenes import Scene, render
from cat_pruning.moved_schedule import lines
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.schedule import Schedule, StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import GenerateConfig, generate, never_pruned
from cat_pruning.tuning.closed_loop import fit_closed_loop
from cat_pruning.tuning.recorder import RecordedRun, record
from cat_pruning.tuning.replay import Replay
from cat_pruning.tuning.scheduler_matrix import scheduler_matrix
from cat_pruning.tuning.search import search
from cat_pruning.tuning.worker import Tuner

STEPS, TEXT_TOKENS, BUDGETS = 28, 24, (9, 7)
FITTED_TO = 16  # recordings
RUN_IN = {"max_sequence_length": TEXT_TOKENS, "output_type": "latent"}


class Transfer:
    """The images of one setting after another.

    Args:
        bundle: of sd3-mini.
        prompts: images a setting.
        recordings: folder of those, and of the schedules fitted to them.
    """

    def __init__(self, bundle: Bundle, prompts: int, recordings: Path) -> None:
        self._bundle, self._count, self._recordings = bundle, prompts, recordings
        self._pipe = load_pipeline(bundle.path, "torch", settings=PruneSettings())
        self._img2img = StableDiffusion3Img2ImgPipeline(**self._pipe.components)
        for pipe in (self._pipe, self._img2img):
            pipe.set_progress_bar_config(disable=True)
        self.tuned = self._tuned(Setting())

    def rows(self, setting: Setting) -> Rows:
        """By contender its error and cost in full steps."""
        with self._shifted(setting.shift):
            if setting.strength < 1.0:
                return rows_of(self._errors_of_img2img(setting))
            return rows_of(self._errors(setting))

    def _errors(self, setting: Setting) -> Errors:
        errors, contenders = Errors(), self._contenders(setting)
        for prompts, first in self._batches(setting):
            full = self._image(never_pruned(PruneSettings(), STEPS), setting, prompts, first, STEPS)[0]
            for (method, budget), settings in contenders.items():
                steps = STEPS if settings is not None else budget
                settings = settings or never_pruned(PruneSettings(), budget)
                latents, computed = self._image(settings, setting, prompts, first, steps)
                errors.add(method, budget, computed, latents, full)
        return errors

    def _errors_of_img2img(self, setting: Setting) -> Errors:
        errors = Errors()
        for prompts, first in self._batches(setting):
            pictures = [_drawn(prompt, setting.size) for prompt in _next(prompts)]

            def image(settings: PruneSettings, strength: float, **options: Any) -> tuple[Tensor, int]:
                return self._late(settings, setting, prompts, first, pictures, strength=strength, **options)  # noqa: B023

            full, steps = image(never_pruned(PruneSettings(), STEPS), setting.strength, num_inference_steps=STEPS)
            sigmas = self._img2img.scheduler.sigmas.tolist()[STEPS - steps : STEPS]

            @functools.cache
            def peers(count: int) -> dict[str, tuple[Tensor, int]]:
                rule, plain = forecast_at(count, steps, self._macs(setting)), never_pruned(PruneSettings(), count)  # noqa: B023
                fewer = np.linspace(sigmas[0], sigmas[-1], count).tolist()  # noqa: B023
                return {
                    "forecast": image(rule, setting.strength, num_inference_steps=STEPS),
                    "fewer steps": image(plain, 1.0, num_inference_steps=count, sigmas=fewer),
                }

            for budget, schedule in self.tuned.items():
                rows = late(schedule, STEPS - steps, sigmas)
                line = Schedule.of(steps, rows.full_steps, lines(rows.full_steps, sigmas))
                for method, table in (("tuned", schedule), ("late rows", rows), ("late line", line)):
                    settings = PruneSettings.tuned(table)
                    latents, count = image(settings, setting.strength, num_inference_steps=STEPS)
                    errors.add(method, budget, count, latents, full)
                    if method != "late line":
                        for peer, (latents, computed) in peers(count).items():
                            errors.add(f"{peer}, as {method}", budget, computed, latents, full)
        return errors

    def _contenders(self, setting: Setting) -> dict[tuple[str, int], PruneSettings | None]:
        """By method and budget; None: fewer steps."""
        found: dict[tuple[str, int], PruneSettings | None] = {}
        macs, sigmas = self._macs(setting), self._sigmas()
        there = self._tuned(setting) if setting.shift != 1.0 else {}
        for budget, schedule in self.tuned.items():
            if setting.shift == 1.0:
                found["tuned", budget] = PruneSettings.tuned(schedule)
            else:
                rows = schedule.model_copy(update={"timesteps": None})
                line = Schedule.of(STEPS, schedule.full_steps, lines(schedule.full_steps, sigmas))
                found["by number", budget] = PruneSettings.tuned(rows)
                found["by sigma", budget] = PruneSettings.tuned(schedule)
                found["line", budget] = PruneSettings.tuned(line)
                found["tuned there", budget] = PruneSettings.tuned(there[budget])
            if setting.batch > 1:
                found["forecast", budget] = forecast_at(budget, STEPS, macs)
                found["fewer steps", budget] = None
        return found

    def _tuned(self, setting: Setting) -> dict[int, Schedule]:
        """Schedules fitted at a setting; found again where they were fitted before."""
        folder = self._recordings / f"shift-{setting.shift:g}"
        files = {budget: folder / f"{STEPS}-{budget}.json" for budget in BUDGETS}
        if not all(file.exists() for file in files.values()):
            for budget, schedule in self._fitted(setting, folder).items():
                schedule.save(files[budget])
        return {budget: Schedule.load(file) for budget, file in files.items()}

    def _fitted(self, setting: Setting, folder: Path) -> dict[int, Schedule]:
        prompts = tuple(prompt.text for prompt in tuning_prompts(f"scenes:{FITTED_TO}"))
        run = RecordedRun(
            bundle=self._bundle.manifest.digest,
            engine="torch",
            scheduler={"class": type(self._pipe.scheduler).__name__, **self._pipe.scheduler.config},
            steps=STEPS,
            prompts=prompts,
            batch=BATCH,
            seed=1_000_000,
            height=setting.size,
            width=setting.size,
            guidance_scale=setting.guidance,
        )
        worker = Tuner(about=About.of(self._bundle, self._pipe), pipe=self._pipe, text_arguments=RUN_IN)
        recorded = record(LocalPool(worker), run, folder, lambda count: None)
        replay = Replay(self._pipe, [worker.call(config) for config in run.configs()], recorded.timesteps)
        matrix, recordings = scheduler_matrix(replay.scheduler), recorded.recordings
        choices = search(recordings.grams().mean(0), matrix, BUDGETS, width=4)
        fits = {budget: fit_closed_loop(replay, recordings, matrix, full) for budget, full in choices.items()}
        return {
            budget: Schedule.of(STEPS, fit.full_steps, fit.weights[-1], fit.weights[0], timesteps=recorded.timesteps)
            for budget, fit in fits.items()
        }

    def _image(
        self, settings: PruneSettings, setting: Setting, prompts: Sequence[Prompt], seed: int, steps: int
    ) -> tuple[Tensor, int]:
        """The final latents of some prompts, and how many steps were full."""
        config = GenerateConfig(
            prompts=tuple(prompt.text for prompt in prompts),
            height=setting.size,
            width=setting.size,
            steps=steps,
            guidance_scale=setting.guidance,
            seed=seed,
            text_arguments=RUN_IN,
        )
        with last_latents(self._pipe) as latents:
            run = generate(self._pipe, settings, config)
        return latents[-1].float(), _full(record.kind for record in run.records)

    def _late(
        self,
        settings: PruneSettings,
        setting: Setting,
        prompts: Sequence[Prompt],
        seed: int,
        pictures: list[Any],
        **options: Any,
    ) -> tuple[Tensor, int]:
        """As `_image`, of an image-to-image run."""
        transformer, kinds = self._img2img.transformer, list[StepKind]()
        transformer.settings = settings
        hook = transformer.register_forward_hook(lambda *_: kinds.append(transformer.last_step.kind))
        try:
            with last_latents(self._img2img) as latents:
                self._img2img(
                    [prompt.text for prompt in prompts],
                    image=pictures,
                    guidance_scale=setting.guidance,
                    generator=[torch.Generator().manual_seed(seed + index) for index in range(len(prompts))],
                    **RUN_IN,
                    **options,
                )
        finally:
            hook.remove()
        return latents[-1].float(), _full(kinds)

    def _batches(self, setting: Setting) -> Iterator[tuple[list[Prompt], int]]:
        """Some prompts at once, with the number of the first."""
        if setting.prompts == "words":
            prompts = [Prompt(text=text, scene=None) for text in WORDS]
        else:
            prompts = load_prompts(f"{setting.prompts}:{self._count}")
        for first in range(0, len(prompts), setting.batch):
            yield prompts[first : first + setting.batch], first

    def _macs(self, setting: Setting) -> Any:
        return costs(self._bundle, setting.size, setting.size, PruneSettings(keep_ratio=1.0), True, "").all

    def _sigmas(self) -> list[float]:
        """Of the pipeline's scheduler, one a step."""
        scheduler = type(self._pipe.scheduler).from_config(self._pipe.scheduler.config)
        scheduler.set_timesteps(STEPS)
        sigmas: list[float] = scheduler.sigmas.tolist()
        return sigmas[:-1]

    def _shifted(self, shift: float) -> Any:
        return _Shifted(self._pipe, shift)


class _Shifted:
    """A pipeline whose scheduler has another shift meanwhile."""

    def __init__(self, pipe: Any, shift: float) -> None:
        self._pipe, self._scheduler, self._shift = pipe, pipe.scheduler, shift

    def __enter__(self) -> None:
        if self._shift != self._scheduler.config.shift:
            self._pipe.scheduler = type(self._scheduler).from_config(self._scheduler.config, shift=self._shift)

    def __exit__(self, *_: object) -> None:
        self._pipe.scheduler = self._scheduler


def _full(kinds: Any) -> int:
    return sum(kind is StepKind.FULL for kind in kinds)


def _next(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each prompt's successor, in a circle."""
    return [*prompts[1:], *prompts[:1]]


def _drawn(prompt: Prompt, side: int) -> Image.Image:
    assert isinstance(prompt.scene, Scene)
    return Image.fromarray(render(prompt.scene, side))


def main() -> None:
    """Run the settings, print their rows, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=16, help="of each setting (default: 16)")
    parser.add_argument("--only", action="append", choices=list(SETTINGS), help="a setting; repeatable (default: all)")
    parser.add_argument("--recordings", type=Path, default=Path("build/eval/transfer"), help="kept, with schedules")
    arguments = parser.parse_args()
    transfer = Transfer(Bundle.open(arguments.bundle), arguments.prompts, arguments.recordings)
    path = RESULTS / "transfer.json"
    for name in arguments.only or SETTINGS:
        rows = transfer.rows(SETTINGS[name])
        for method, row in rows.items():
            error = f"{row['latents_error']:.4f} ± {row['half_width']:.4f}"
            print(f"{name:22s} {method:26s} {error}  {row['full_steps']} full")  # noqa: T201
        known = json.loads(path.read_text(encoding="utf-8"))["settings"] if path.exists() else {}
        ordered = {each: (known | {name: rows})[each] for each in SETTINGS if each in known or each == name}
        result = {
            "fitted_to": FITTED_TO,
            "full_steps": {str(budget): schedule.full_steps for budget, schedule in transfer.tuned.items()},
            "settings": ordered,
        }
        write_result("transfer", result)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
