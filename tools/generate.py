"""Images from a pipeline with a `CatTransformer`, with the time and the record of every step."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from PIL import Image

from cat_pruning.checkpoints.library_logs import first_line
from cat_pruning.console import is_lack_of_memory
from cat_pruning.errors import CatError, EngineError
from cat_pruning.finite import is_finite
from cat_pruning.runtime.record import StepRecord
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.schedule import StepKind
from cat_pruning.settings import PruneSettings

_TRANSFORMERS: Final = ("cat_pruning.runtime.", "cat_pruning.engines.", "cat_pruning.families.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """What to generate; sizes in pixels. `text_arguments` go to the pipeline as they are."""

    prompts: tuple[str, ...]
    height: int
    width: int
    steps: int
    guidance_scale: float
    seed: int = 0
    text_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One generation: its images, its wall time, and for every step what it computed and how long it took.

    stage_seconds: of the wall time: "encode" (the prompts), "steps" (the scheduler's work too), "decode".
    """

    images: list[Image.Image]
    seconds: float
    records: list[StepRecord]
    step_ms: list[float]
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def median_ms(self, *, full: bool) -> float | None:
        """Median time of the full steps or of the others, selection included; None where there are none."""
        steps = zip(self.records, self.step_ms, strict=True)
        times = [ms for record, ms in steps if (record.kind is StepKind.FULL) is full]
        return statistics.median(times) if times else None


def generate(pipe: Any, settings: PruneSettings, config: GenerateConfig) -> Run:
    """Generate with `pipe`, whose transformer is a `CatTransformer`, under `settings`.

    The first image of a process is slower: it warms up allocators and thread pools. Synchronises with a GPU after
    every step, to time it, and when the images are decoded.

    Raises:
        EngineError: the decoded images are not finite: they would be black; or the pipeline itself fails.
    """
    transformer: CatTransformer = pipe.transformer
    transformer.settings = settings
    generators = [torch.Generator().manual_seed(config.seed + index) for index in range(len(config.prompts))]
    with _timed_steps(transformer) as steps, _finite_images(pipe.vae), _failures_told(pipe):
        started = time.perf_counter()
        images = pipe(
            list(config.prompts),
            height=config.height,
            width=config.width,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance_scale,
            generator=generators,
            **config.text_arguments,
        ).images
        ended = time.perf_counter()
    stages = {"encode": steps.began - started, "steps": steps.ended - steps.began, "decode": ended - steps.ended}
    return Run(images=images, seconds=ended - started, records=steps.records, step_ms=steps.ms, stage_seconds=stages)


def never_pruned(settings: PruneSettings, steps: int) -> PruneSettings:
    """The same settings with every one of `steps` steps full: the run to compare with."""
    return settings.replace(full_steps=max(2, 2 * steps), schedule=None)  # Heun counts fewer steps, never more


@dataclass(slots=True)
class _Steps:
    """The steps of one generation: records, times in ms, when the first call began and the last one ended."""

    records: list[StepRecord] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0


@contextmanager
def _timed_steps(transformer: CatTransformer) -> Iterator[_Steps]:
    """The steps that `transformer` computes meanwhile; calls of one step are added up."""
    steps = _Steps()
    started = 0.0

    def before(module: torch.nn.Module, arguments: Any) -> None:
        nonlocal started
        _synchronise(transformer)
        started = time.perf_counter()
        steps.began = steps.began or started

    def after(module: torch.nn.Module, arguments: Any, result: Any) -> None:
        _synchronise(transformer)
        steps.ended = time.perf_counter()
        elapsed = (steps.ended - started) * 1e3
        record = transformer.last_step
        assert record is not None
        if steps.records and steps.records[-1] is record:  # the second call of a Heun step
            steps.ms[-1] += elapsed
        else:
            steps.records.append(record)
            steps.ms.append(elapsed)

    hooks = [transformer.register_forward_pre_hook(before), transformer.register_forward_hook(after)]
    try:
        yield steps
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _finite_images(vae: Any) -> Iterator[None]:
    """Meanwhile, what the VAE decodes is looked at: as 8-bit pixels, NaN is black."""

    def check(module: torch.nn.Module, arguments: Any, image: torch.Tensor) -> None:
        if is_finite(image):
            return
        if image.dtype is torch.float16:
            raise EngineError(
                "the decoded image has values that are not finite: the VAE, or the model on a late step, overflows in "
                "fp16",
                "export it with --dtype bf16; where it is the VAE, and that is no graph of --components, "
                'load_pipeline(…, dtype="fp32") helps as well',
            )
        raise EngineError(
            "the decoded image has values that are not finite: the VAE's weights or the latents are damaged",
            "export it again, from a checkpoint whose VAE is sound",
        )

    hook = vae.decoder.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _failures_told(pipe: Any) -> Iterator[None]:
    """Meanwhile, what the pipeline's own code stumbles over is told as its failure: its parts, or its arguments."""
    try:
        yield
    except (CatError, MemoryError, OSError):
        raise
    except Exception as error:
        if _is_ours(error) or is_lack_of_memory(error):
            raise
        raise EngineError(
            f"{type(pipe).__name__} failed ({type(error).__name__}: {first_line(error)})",
            "its parts do not fit each other, or it takes no such arguments; CAT_PRUNING_LOG=DEBUG shows where",
        ) from error


def _is_ours(error: Exception) -> bool:
    """Whether an error is of our own, or of our transformer and what that called, and not of the pipeline's parts."""
    if type(error).__module__.startswith("cat_pruning."):
        return True
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(module.startswith(_TRANSFORMERS) for module in modules)


def _synchronise(transformer: CatTransformer) -> None:
    if transformer.device.type == "cuda":
        torch.cuda.synchronize(transformer.device)
