"""The run of an evaluation: every candidate makes images of the same prompts and seeds, which are scored at once."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cat_pruning.errors import OutputError
from cat_pruning.evaluation.candidates import FULL, Candidate
from cat_pruning.evaluation.methods import AT_EDM
from cat_pruning.evaluation.metrics import Metric, Metrics, Sample
from cat_pruning.evaluation.place import IMAGES, TOKENS, picture_name
from cat_pruning.evaluation.prompts import Prompt
from cat_pruning.evaluation.results import ImageResult, ResultStore, RunSpec
from cat_pruning.evaluation.solvers import SOLVERS, solver_in
from cat_pruning.evaluation.truth import truth_candidate
from cat_pruning.files import replacing
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.schedule import StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import GenerateConfig, Run, generate
from cat_pruning.tools.pictures import draw_token_map

Advance = Callable[[Candidate, int], None]  # called with a candidate and how many more of its images are done


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """A diffusers pipeline that makes every candidate's images, and the transformers that it is given in turn.

    Attributes:
        pipe: the pipeline.
        transformer: the one of the bundle's engine.
        at_edm: makes AT-EDM's, which holds the weights a second time; called when it is first needed.
        settings: of the pruning; each method changes some.
        text_arguments: passed to the pipeline's call as they are.
    """

    pipe: Any
    transformer: CatTransformer
    at_edm: Callable[[], CatTransformer]
    settings: PruneSettings
    text_arguments: dict[str, Any]

    def __call__(self, candidate: Candidate, config: GenerateConfig) -> tuple[Run, Tensor]:
        """The images of a batch of prompts and their last latents."""
        self.pipe.transformer = self.at_edm() if candidate.method == AT_EDM else self.transformer
        solver = solver_in(self.pipe, candidate.method) if candidate.method in SOLVERS else nullcontext()
        with solver, last_latents(self.pipe) as latents:
            run = generate(self.pipe, PruneSettings.from_dict(candidate.settings), config)
        return run, latents[-1].float()


def evaluate(
    store: ResultStore, prompts: list[Prompt], metrics: Metrics, generator: Generator, advance: Advance
) -> None:
    """Make and score the images that `store` has no results of yet.

    Of each batch of prompts and each schedule, the full run comes first: the other candidates are scored against it.

    Raises:
        OutputError: the directory cannot be written.
        EngineError: an engine failed.
    """
    spec = store.spec
    for candidate in spec.candidates:
        advance(candidate, sum(len(store.done(candidate, seed)) for seed in range(spec.seeds)))
    for seed in range(spec.seeds):
        for start in range(0, len(prompts), spec.batch):
            numbers = range(start, min(start + spec.batch, len(prompts)))
            batch = _Batch(
                numbers=numbers,
                seed=seed,
                noise_seed=seed * len(prompts) + start,
                prompts=prompts[start:][: spec.batch],
            )
            truth = functools.cache(functools.partial(_truth, spec, metrics, generator, batch))
            for steps in dict.fromkeys(candidate.steps for candidate in spec.candidates):
                due = [each for each in spec.candidates if each.steps == steps and _due(store, each, batch)]
                if due:
                    _evaluate_batch(store, metrics, generator, steps, due, batch, truth, advance)
            gc.collect()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """The images that are made at once: their prompts, those prompts' numbers, and where their noise is from."""

    numbers: range
    seed: int
    noise_seed: int
    prompts: list[Prompt]

    def config(self, spec: RunSpec, steps: int, text_arguments: dict[str, Any]) -> GenerateConfig:
        return GenerateConfig(
            prompts=tuple(prompt.text for prompt in self.prompts),
            height=spec.height,
            width=spec.width,
            steps=steps,
            guidance_scale=spec.guidance_scale,
            seed=self.noise_seed,
            text_arguments=text_arguments,
        )


def _truth(spec: RunSpec, metrics: Metrics, generator: Generator, batch: _Batch) -> Tensor | None:
    """The truth's latents, if a metric needs them."""
    if Metric.TRUTH not in metrics.metrics:
        return None
    candidate = truth_candidate(generator.pipe.scheduler)
    return generator(candidate, batch.config(spec, candidate.sampled_steps, generator.text_arguments))[1]


def _due(store: ResultStore, candidate: Candidate, batch: _Batch) -> bool:
    wanted = {index for index in batch.numbers if index < candidate.prompts}
    return bool(wanted - store.done(candidate, batch.seed))


def _evaluate_batch(
    store: ResultStore,
    metrics: Metrics,
    generator: Generator,
    steps: int,
    due: list[Candidate],
    batch: _Batch,
    truth: Callable[[], Tensor | None],
    advance: Advance,
) -> None:
    spec = store.spec
    full = next(candidate for candidate in spec.candidates if candidate.method == FULL and candidate.steps == steps)
    reference: Sample | None = None
    for candidate in [full, *(candidate for candidate in due if candidate is not full)]:
        config = batch.config(spec, candidate.sampled_steps, generator.text_arguments)
        run, latents = generator(candidate, config)
        sample = Sample(images=run.images, latents=latents)
        try:
            _keep_pictures(store, candidate, run, batch.seed, batch.numbers)
        except OSError as error:
            raise OutputError(
                f"{store.directory} cannot be written ({error.strerror or error})", "make room"
            ) from error
        if candidate in due:
            scores = metrics.score(sample, reference, batch.prompts, truth())
            done = store.done(candidate, batch.seed)
            seconds = run.seconds / len(batch.numbers)
            results = [
                ImageResult(candidate=candidate.key, prompt=index, seed=batch.seed, seconds=seconds, scores=score)
                for index, score in zip(batch.numbers, scores, strict=True)
                if index not in done and index < candidate.prompts
            ]
            store.append(results)
            advance(candidate, len(results))
        if candidate is full:
            reference = sample


def _keep_pictures(store: ResultStore, candidate: Candidate, run: Run, seed: int, batch: range) -> None:
    """Write the images of the first prompts, and a map of the first prompt's tokens."""
    if seed or batch.start >= store.spec.sheet:
        return
    store.list_added()
    folder = store.directory / IMAGES / candidate.key
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in zip(batch, run.images, strict=True):
        if index < store.spec.sheet:
            with replacing(folder / picture_name(index)) as part:  # an image that has results is never made again
                image.save(part, format="PNG")
    if batch.start == 0 and any(record.kind is StepKind.PRUNED for record in run.records):
        rows = run.records[0].keep_indices.shape[0]
        row = rows // 2 if rows == 2 * len(batch) else 0  # the first prompt's positive one
        draw_token_map(run.records, store.directory / TOKENS / f"{candidate.key}.png", run.images[0], row)


@contextmanager
def last_latents(pipe: Any) -> Iterator[list[Tensor]]:
    """A list that holds the latents after the last step that `pipe` took meanwhile, as its scheduler returned them."""
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
