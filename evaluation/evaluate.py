"""The run of an evaluation: every variant's images of the same prompts and seeds, scored as they come."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cat_pruning.errors import OutputError
from cat_pruning.evaluation.methods import AT_EDM
from cat_pruning.evaluation.metrics import Metrics, Sample
from cat_pruning.evaluation.prompts import Prompt
from cat_pruning.evaluation.results import IMAGES, TOKENS, ImageResult, ResultStore
from cat_pruning.evaluation.variants import FULL, Variant
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.schedule import StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import GenerateConfig, Run, generate
from cat_pruning.tools.pictures import draw_token_map

Advance = Callable[[Variant, int], None]  # a variant, and how many more of its images are done


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """What makes the images: a diffusers pipeline, and the transformers that stand in it in turn.

    Attributes:
        pipe: the pipeline.
        transformer: of the bundle's engine.
        at_edm: makes AT-EDM's, which takes a second set of weights; called when it is first needed.
        settings: the pruning's, of which each method changes some.
        text_arguments: of the pipeline's call.
    """

    pipe: Any
    transformer: CatTransformer
    at_edm: Callable[[], CatTransformer]
    settings: PruneSettings
    text_arguments: dict[str, Any]

    def __call__(self, variant: Variant, prompts: list[Prompt], config: GenerateConfig) -> tuple[Run, Tensor]:
        """The images of a batch of prompts and their last latents."""
        self.pipe.transformer = self.at_edm() if variant.method == AT_EDM else self.transformer
        with last_latents(self.pipe) as latents:
            run = generate(self.pipe, PruneSettings.from_dict(variant.settings), config)
        return run, latents[-1].float()


def evaluate(
    store: ResultStore, prompts: list[Prompt], metrics: Metrics, generator: Generator, advance: Advance
) -> None:
    """Run what `store` has no results of yet, batch by batch: the full run first, the other variants against it.

    Raises:
        OutputError: the directory cannot be written.
        EngineError: an engine failed.
    """
    spec = store.spec
    for variant in spec.variants:
        advance(variant, sum(len(store.done(variant, seed)) for seed in range(spec.seeds)))
    for seed in range(spec.seeds):
        for start in range(0, len(prompts), spec.batch):
            batch = range(start, min(start + spec.batch, len(prompts)))
            for steps in dict.fromkeys(variant.steps for variant in spec.variants):
                due = [v for v in spec.variants if v.steps == steps and _due(store, v, seed, batch)]
                if due:
                    _evaluate_batch(store, prompts, metrics, generator, steps, due, seed, batch, advance)
            gc.collect()


def _due(store: ResultStore, variant: Variant, seed: int, batch: range) -> bool:
    wanted = {index for index in batch if index < variant.prompts}
    return bool(wanted - store.done(variant, seed))


def _evaluate_batch(
    store: ResultStore,
    prompts: list[Prompt],
    metrics: Metrics,
    generator: Generator,
    steps: int,
    due: list[Variant],
    seed: int,
    batch: range,
    advance: Advance,
) -> None:
    spec, texts = store.spec, [prompts[index] for index in batch]
    full = next(variant for variant in spec.variants if variant.method == FULL and variant.steps == steps)
    reference: Sample | None = None
    for variant in [full, *(variant for variant in due if variant is not full)]:
        config = GenerateConfig(
            prompts=tuple(prompt.text for prompt in texts),
            height=spec.height,
            width=spec.width,
            steps=variant.sampled_steps,
            guidance_scale=spec.guidance_scale,
            seed=seed * len(prompts) + batch.start,
            text_arguments=generator.text_arguments,
        )
        run, latents = generator(variant, texts, config)
        sample = Sample(images=run.images, latents=latents)
        try:
            _keep_pictures(store, variant, run, seed, batch)
        except OSError as error:
            raise OutputError(
                f"{store.directory} cannot be written ({error.strerror or error})", "make room"
            ) from error
        if variant in due:
            scores = metrics.score(sample, reference, texts)
            done = store.done(variant, seed)
            results = [
                ImageResult(
                    variant=variant.key, prompt=index, seed=seed, seconds=run.seconds / len(batch), scores=score
                )
                for index, score in zip(batch, scores, strict=True)
                if index not in done and index < variant.prompts
            ]
            store.append(results)
            advance(variant, len(results))
        if variant is full:
            reference = sample


def _keep_pictures(store: ResultStore, variant: Variant, run: Run, seed: int, batch: range) -> None:
    """The images of the first prompts, and the first prompt's tokens."""
    if seed or batch.start >= store.spec.sheet:
        return
    folder = store.directory / IMAGES / variant.key
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in zip(batch, run.images, strict=True):
        if index < store.spec.sheet:
            part = folder / f".{index:05d}-{seed}.part"  # whole or not at all: results that follow are never redone
            image.save(part, format="PNG")
            part.replace(folder / f"{index:05d}-{seed}.png")
    if batch.start == 0 and any(record.kind is StepKind.PRUNED for record in run.records):
        rows = run.records[0].keep_indices.shape[0]
        row = rows // 2 if rows == 2 * len(batch) else 0  # the first prompt's positive one
        draw_token_map(run.records, store.directory / TOKENS / f"{variant.key}.png", run.images[0], row)


@contextmanager
def last_latents(pipe: Any) -> Iterator[list[Tensor]]:
    """The latents after each step that `pipe` takes meanwhile, whatever its family: what its scheduler returns."""
    scheduler = pipe.scheduler
    latents: list[Tensor] = []
    step = scheduler.step

    def recorded(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        latents[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    scheduler.step = recorded
    try:
        yield latents
    finally:
        del scheduler.step
