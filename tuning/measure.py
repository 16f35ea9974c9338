"""What schedules do to images that they were not fitted to, beside other ways to make them at the same cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

from cat_pruning.evaluation.evaluate import last_latents
from cat_pruning.evaluation.intervals import Interval, mean_interval
from cat_pruning.evaluation.metrics import Metric, Metrics, Sample
from cat_pruning.evaluation.prompts import Prompt
from cat_pruning.evaluation.solvers import solver_in
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import GenerateConfig, generate

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


@dataclass(slots=True)
class _Scores:
    error: list[float | None] = field(default_factory=list)
    psnr_db: list[float | None] = field(default_factory=list)
    change: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def measure(
    pipe: Any,
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    configs: Sequence[GenerateConfig],
    advance: Callable[[int], None],
) -> list[Outcome]:
    """Make every contender's images of the same prompts and noise, and hold them against the full run's.

    Args:
        pipe: a pipeline with a `CatTransformer`; its settings are changed.
        contenders: in the order of the results; the first is the full run.
        prompts: all of them.
        configs: the pipeline's calls, in the order of the prompts; each contender changes the steps.
        advance: called with the number of images that were made.
    """
    square = all(config.height == config.width for config in configs)
    scenes = square and all(prompt.scene is not None for prompt in prompts)
    metrics = Metrics([Metric.LATENTS, Metric.PSNR, *([Metric.COVERAGE] if scenes else [])], prompts)
    scores = [_Scores() for _ in contenders]
    for config, batch in zip(configs, _batches(prompts, configs), strict=True):
        full: Sample | None = None
        of_full: list[dict[str, float | None]] = []
        for contender, collected in zip(contenders, scores, strict=True):
            sample, seconds = _sample(pipe, config, contender)
            full = full or sample
            of_sample = metrics.score(sample, full, batch)
            of_full = of_full or of_sample
            collected.error += [score["latents_error"] for score in of_sample]
            collected.psnr_db += [score["psnr_db"] for score in of_sample]
            collected.change += [_change(one, other) for one, other in zip(of_sample, of_full, strict=True)]
            collected.seconds.append(seconds / len(batch))
            advance(len(batch))
    return [_outcome(contender, collected) for contender, collected in zip(contenders, scores, strict=True)]


def _batches(prompts: Sequence[Prompt], configs: Sequence[GenerateConfig]) -> Iterator[Sequence[Prompt]]:
    first = 0
    for config in configs:
        yield prompts[first : first + len(config.prompts)]
        first += len(config.prompts)


def _sample(pipe: Any, config: GenerateConfig, contender: Contender) -> tuple[Sample, float]:
    changed = dataclasses.replace(config, steps=contender.steps)
    with solver_in(pipe, contender.solver) if contender.solver else nullcontext(), last_latents(pipe) as latents:
        run = generate(pipe, contender.settings, changed)
    return Sample(images=run.images, latents=latents[-1].float()), run.seconds


def _change(score: dict[str, float | None], of_full: dict[str, float | None]) -> float | None:
    one, other = score.get("coverage"), of_full.get("coverage")
    return one - other if one is not None and other is not None else None


def _outcome(contender: Contender, scores: _Scores) -> Outcome:
    prompts = range(len(scores.error))
    error = mean_interval(scores.error, prompts)
    assert error is not None
    return Outcome(
        contender=contender,
        error=error,
        psnr_db=mean_interval(scores.psnr_db, prompts),
        score_change=mean_interval(scores.change, prompts),
        seconds=sorted(scores.seconds)[len(scores.seconds) // 2],
    )
