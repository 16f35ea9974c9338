"""What schedules do to images that they were not fitted to, beside other ways to make them at the same cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

from cat_pruning.evaluation.intervals import Interval, mean_interval
from cat_pruning.evaluation.metrics import Metric, Metrics, Sample
from cat_pruning.evaluation.pool import Pool, Tell
from cat_pruning.evaluation.solvers import solver_in
from cat_pruning.evaluation.worker import last_latents
from cat_pruning.models.prompts import Prompt
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import GenerateConfig, generate
from cat_pruning.tuning.worker import Tuner

FULL: Final = "full"  # what the others are held against


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to make an image.

    Attributes:
        method: what it is called.
        budget: the number of full steps that it costs as much as.
        steps: that the pipeline is asked for.
        settings: what they compute.
        macs: of an image.
        solver: of its steps, of `evaluation.solvers`; None: the pipeline's own scheduler.
    """

    method: str
    budget: int
    steps: int
    settings: PruneSettings
    macs: int
    solver: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a contender's images differ from the full run's.

    Attributes:
        contender: which.
        error: relative error of the final latents.
        psnr_db: of the pictures; None where they are equal.
        score_change: of the coverage, less the full run's; None where prompts are no scenes, or pictures not square.
        seconds: of a batch's images, one each, median over the batches.
    """

    contender: Contender
    error: Interval
    psnr_db: Interval | None
    score_change: Interval | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A job: a batch of prompts, and who makes its images, the full run first.

    Attributes:
        config: the pipeline's call; each contender changes the steps.
        metrics, prompts: what the images are scored by.
    """

    config: GenerateConfig
    metrics: tuple[Metric, ...]
    prompts: tuple[Prompt, ...]
    contenders: tuple[Contender, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A contender's images of a batch: their scores by `Metric.score`, and the seconds of all of them."""

    scores: list[dict[str, float | None]]
    seconds: float


def measure(
    pool: Pool[Tuner],
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    configs: Sequence[GenerateConfig],
    advance: Callable[[int], None],
) -> list[Outcome]:
    """Make every contender's images of the same prompts and noise, and hold them against the full run's.

    Args:
        pool: its workers make the images.
        contenders: in the order of the results; the first is the full run.
        prompts: all of them.
        configs: the pipeline's calls, in the order of the prompts; each contender changes the steps.
        advance: called with the number of images that were made.

    Raises:
        CatError: as `Pool.run`.
    """
    square = all(config.height == config.width for config in configs)
    scenes = square and all(prompt.scene is not None for prompt in prompts)
    metrics = (Metric.LATENTS, Metric.PSNR, *([Metric.COVERAGE] if scenes else []))
    batches = [
        Batch(config=config, metrics=metrics, prompts=tuple(some), contenders=tuple(contenders))
        for config, some in zip(configs, _batches(prompts, configs), strict=True)
    ]
    found: list[list[Scored]] = [[] for _ in batches]  # of every batch, in the order of the contenders

    def keep(number: int, scored: Scored) -> None:
        found[number].append(scored)
        advance(len(scored.scores))

    pool.run(make_images, batches, keep)
    of_contenders = list(zip(*found, strict=True))
    return [_outcome(each, scored, of_contenders[0]) for each, scored in zip(contenders, of_contenders, strict=True)]


def make_images(worker: Tuner, batch: Batch, tell: Tell) -> None:
    """Make a batch's images and tell `Scored` of every contender, in their order."""
    metrics = Metrics(batch.metrics, batch.prompts)
    full: Sample | None = None
    for contender in batch.contenders:
        sample, seconds = _sample(worker, batch.config, contender)
        full = full or sample
        tell(Scored(scores=metrics.score(sample, full, batch.prompts), seconds=seconds))


def _batches(prompts: Sequence[Prompt], configs: Sequence[GenerateConfig]) -> Iterator[Sequence[Prompt]]:
    first = 0
    for config in configs:
        yield prompts[first : first + len(config.prompts)]
        first += len(config.prompts)


def _sample(worker: Tuner, config: GenerateConfig, contender: Contender) -> tuple[Sample, float]:
    pipe, changed = worker.pipe, worker.call(dataclasses.replace(config, steps=contender.steps))
    with solver_in(pipe, contender.solver) if contender.solver else nullcontext(), last_latents(pipe) as latents:
        run = generate(pipe, contender.settings, changed)
    return Sample(images=run.images, latents=latents[-1].float()), run.seconds


def _outcome(contender: Contender, batches: Sequence[Scored], of_full: Sequence[Scored]) -> Outcome:
    scores = [score for batch in batches for score in batch.scores]
    others = [score for batch in of_full for score in batch.scores]
    prompts = range(len(scores))
    error = mean_interval([score["latents_error"] for score in scores], prompts)
    assert error is not None
    return Outcome(
        contender=contender,
        error=error,
        psnr_db=mean_interval([score["psnr_db"] for score in scores], prompts),
        score_change=mean_interval([_change(*pair) for pair in zip(scores, others, strict=True)], prompts),
        seconds=sorted(batch.seconds / len(batch.scores) for batch in batches)[len(batches) // 2],
    )


def _change(score: dict[str, float | None], of_full: dict[str, float | None]) -> float | None:
    one, other = score.get("coverage"), of_full.get("coverage")
    return one - other if one is not None and other is not None else None
