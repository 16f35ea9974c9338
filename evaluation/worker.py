"""What computes in an evaluation: it makes the images of a batch of prompts by every candidate, and scores them."""

from __future__ import annotations

import functools
import gc
import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import EngineError
from cat_pruning.evaluation.about import About, QuantizedBundle
from cat_pruning.evaluation.at_edm import AtEdmStepEngine
from cat_pruning.evaluation.candidates import Candidate
from cat_pruning.evaluation.methods import AT_EDM
from cat_pruning.evaluation.metrics import Metric, Metrics, Sample
from cat_pruning.evaluation.place import picture_place, token_map_place
from cat_pruning.evaluation.pool import Tell
from cat_pruning.evaluation.quantized import open_quantized
from cat_pruning.evaluation.results import ImageResult
from cat_pruning.evaluation.solvers import SOLVERS, check_solver, solver_in
from cat_pruning.evaluation.truth import truth_candidate
from cat_pruning.families import family_named
from cat_pruning.models.prompts import Prompt
from cat_pruning.runtime.engine_choice import engine_from_bundle, open_signed
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.schedule import StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import GenerateConfig, Run, generate
from cat_pruning.tools.pictures import token_map


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """A diffusers pipeline that makes every candidate's images, and the transformers that it is given in turn.

    Attributes:
        pipe: the pipeline.
        transformer: the one of the bundle's engine.
        at_edm: makes AT-EDM's, which holds the weights a second time; called when it is first needed.
        text_arguments: passed to the pipeline's call as they are.
        quantized: those of quantized bundles, by the names of their quantizations.
    """

    pipe: Any
    transformer: CatTransformer
    at_edm: Callable[[], CatTransformer]
    text_arguments: dict[str, Any]
    quantized: Mapping[str, CatTransformer] = field(default_factory=dict)

    def __call__(self, candidate: Candidate, config: GenerateConfig) -> tuple[Run, Tensor]:
        """The images of a batch of prompts and their last latents."""
        self.pipe.transformer = self._transformer(candidate)
        solver = solver_in(self.pipe, candidate.method) if candidate.method in SOLVERS else nullcontext()
        asked = replace(config, steps=candidate.sampled_steps, text_arguments=self.text_arguments)
        with solver, last_latents(self.pipe) as latents:
            run = generate(self.pipe, PruneSettings.from_dict(candidate.settings), asked)
        return run, latents[-1].float()

    def _transformer(self, candidate: Candidate) -> CatTransformer:
        if candidate.quantization:
            return self.quantized[candidate.quantization]
        return self.at_edm() if candidate.method == AT_EDM else self.transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """A worker of `cat_pruning.evaluation.pool`: a pipeline, and the metrics of what it makes."""

    about: About
    generator: Generator
    metrics: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Loads an `Evaluator`.

    Attributes:
        bundle: its directory, absolute, or a URL. public_key: what it must be signed with. engine: that computes.
        quantized: of quantized bundles of the same model, likewise.
        settings: of the pruning; each method changes some.
        methods: that are compared.
        metrics, prompts, clip_model, lpips_weights: see `Metrics`.

    Raises:
        CatError: as `Metrics`, `load_pipeline`, `open_quantized` and `check_solver`.
    """

    bundle: Path | str
    public_key: Path | None
    engine: str
    settings: PruneSettings
    methods: tuple[str, ...]
    metrics: tuple[Metric, ...]
    prompts: tuple[Prompt, ...]
    clip_model: str
    lpips_weights: Path | None
    quantized: tuple[Path | str, ...] = ()

    def __call__(self) -> Evaluator:
        """Load it; what can be checked is checked first."""
        metrics = Metrics(self.metrics, self.prompts, self.clip_model, lpips_weights=self.lpips_weights)
        bundle = open_signed(self.bundle, self.public_key, self.engine)
        others = open_quantized(self.quantized, bundle, self.public_key, self.engine)
        pipe = load_pipeline(bundle.path, self.engine, settings=self.settings, public_key=self.public_key)
        pipe.set_progress_bar_config(disable=True)
        for method in self.methods:
            if method in SOLVERS:
                check_solver(method, pipe.scheduler)
        manifest = bundle.manifest
        text = family_named(manifest.family, manifest.transformer_config).pipeline_arguments(
            pipe, manifest.geometry.text_length
        )
        quantized = {name: self._transformer(other, pipe) for name, other in others.items()}
        about = [
            QuantizedBundle(name=name, digest=other.manifest.digest, engine=quantized[name].engine.name)
            for name, other in others.items()
        ]
        generator = Generator(
            pipe=pipe,
            transformer=pipe.transformer,
            at_edm=functools.cache(functools.partial(_at_edm, bundle, self.settings)),
            text_arguments=text,
            quantized=quantized,
        )
        return Evaluator(about=About.of(bundle, pipe, about), generator=generator, metrics=metrics)

    def _transformer(self, bundle: Bundle, pipe: Any) -> CatTransformer:
        """That of a quantized bundle, beside the other parts of the pipeline."""
        transformer = CatTransformer(engine_from_bundle(bundle, self.engine), self.settings)
        if transformer.device != pipe.transformer.device:
            raise EngineError(
                f"{bundle.path} is computed on {transformer.device} by {transformer.engine.name}, and the first bundle "
                f"on {pipe.transformer.device} by {pipe.transformer.engine.name}",
                "take an engine that has both in one place, as --engine onnxruntime",
            )
        return transformer


def _at_edm(bundle: Bundle, settings: PruneSettings) -> CatTransformer:
    engine = engine_from_bundle(bundle, "torch")
    assert isinstance(engine, TorchStepEngine)
    return CatTransformer(AtEdmStepEngine(engine.transformer), settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A job: the images that are made at once.

    Attributes:
        config: the pipeline's call; each candidate has its own steps.
        prompts, numbers: what the images are of, and those prompts' numbers.
        seed: the images' number among those of their prompts.
        candidates: what makes them: of each schedule, the full run comes first.
        due: of each candidate, by key, the prompts that it has no results of; of a full run there may be none.
        sheet: of the first so many prompts the images are kept.
    """

    config: GenerateConfig
    prompts: tuple[Prompt, ...]
    numbers: range
    seed: int
    candidates: tuple[Candidate, ...]
    due: dict[str, frozenset[int]]
    sheet: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A candidate's images of a batch: their results, and the pictures to keep, by their places in the directory."""

    candidate: Candidate
    results: list[ImageResult]
    pictures: dict[str, bytes]


def make_images(worker: Evaluator, batch: Batch, tell: Tell) -> None:
    """Make a batch's images and tell `Scored` of every candidate that is due; of each schedule the full run is first.

    Raises:
        EngineError: an engine failed.
    """
    truth = functools.cache(lambda: _truth(worker, batch))
    reference: Sample | None = None
    for candidate in batch.candidates:
        began = time.process_time()
        run, latents = worker.generator(candidate, batch.config)
        cpu_seconds = time.process_time() - began
        sample = Sample(images=run.images, latents=latents)
        if candidate.is_reference:
            reference = sample
        if batch.due[candidate.key]:
            others = None if sample is reference else reference  # the full run is compared with no other
            scores = worker.metrics.score(sample, others, batch.prompts, truth())
            results = [
                ImageResult(
                    candidate=candidate.key,
                    prompt=number,
                    seed=batch.seed,
                    seconds=run.seconds / len(batch.numbers),
                    cpu_seconds=cpu_seconds / len(batch.numbers),
                    scores=of_image,
                )
                for number, of_image in zip(batch.numbers, scores, strict=True)
                if number in batch.due[candidate.key]
            ]
            tell(Scored(candidate=candidate, results=results, pictures=_pictures(candidate, run, batch)))
    gc.collect()


def _truth(worker: Evaluator, batch: Batch) -> Tensor | None:
    """The truth's latents, if a metric needs them."""
    if Metric.TRUTH not in worker.metrics.metrics:
        return None
    return worker.generator(truth_candidate(worker.generator.pipe.scheduler), batch.config)[1]


def _pictures(candidate: Candidate, run: Run, batch: Batch) -> dict[str, bytes]:
    """The images of the first prompts, and a map of the first prompt's tokens."""
    if batch.seed:
        return {}
    pictures = {
        picture_place(candidate.key, number): _png(image)
        for number, image in zip(batch.numbers, run.images, strict=True)
        if number < batch.sheet
    }
    if 0 in batch.numbers and pictures and any(record.kind is StepKind.PRUNED for record in run.records):
        rows = run.records[0].keep_indices.shape[0]
        row = rows // 2 if rows == 2 * len(batch.numbers) else 0  # the first prompt's positive one
        pictures[token_map_place(candidate.key)] = token_map(run.records, run.images[0], row)
    return pictures


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


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
