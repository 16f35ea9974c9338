"""`cat-eval`: what pruning does to the picture, against the full run, other methods and fewer steps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cat_pruning import console
from cat_pruning.errors import EngineError, SettingsError
from cat_pruning.evaluation.arguments import check, parse
from cat_pruning.installation import require
from cat_pruning.terminal import progress, say, terminal, waiting

if TYPE_CHECKING:
    from rich.console import Console

    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.evaluation.evaluate import Advance, Generator
    from cat_pruning.evaluation.metrics import Metric
    from cat_pruning.evaluation.results import ResultStore, RunSpec


def main(argv: list[str] | None = None) -> int:
    """Entry point of `cat-eval`."""
    again = "what is done is kept; start it again in the same way and it goes on"
    return console.run("cat-eval", lambda: _evaluate(parse(argv)), again)


def _evaluate(arguments: argparse.Namespace) -> None:
    check(arguments)
    require("cat-eval", "eval")
    console.check_address_space()
    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.bundle.outside import check_directory_outside
    from cat_pruning.evaluation.clip_score import DEFAULT_CLIP_MODEL
    from cat_pruning.evaluation.evaluate import evaluate
    from cat_pruning.evaluation.metrics import Metrics
    from cat_pruning.evaluation.place import alone
    from cat_pruning.evaluation.prompts import load_prompts
    from cat_pruning.evaluation.report import write_report
    from cat_pruning.evaluation.results import ResultStore, clear, existing_spec

    console.quiet_libraries()
    screen = terminal(stderr=True)
    check_directory_outside("--out", arguments.out)
    existing_spec(arguments.out, force=arguments.force)  # before the bundle is loaded
    prompts = load_prompts(arguments.prompts, arguments.limit)
    bundle = Bundle.open(arguments.bundle)
    metrics = _metrics(arguments, all(prompt.scene is not None for prompt in prompts))
    clip_model = arguments.clip_model or DEFAULT_CLIP_MODEL
    scorer = Metrics(metrics, prompts, clip_model, lpips_weights=arguments.lpips_weights)
    with waiting(screen, "Load the bundle …"):
        generator = _load(arguments, bundle)
    spec = _spec(arguments, bundle, generator, [prompt.text for prompt in prompts], metrics)
    with alone(arguments.out):
        if arguments.force:
            clear(arguments.out)
        store = ResultStore(arguments.out, spec)
        if store.added:
            say(f"{arguments.out} grows: {', '.join(store.added)}", to=screen)
        with _progress(screen, store) as advance:
            evaluate(store, prompts, scorer, generator, advance)
        say(str(write_report(arguments.out)))


def _metrics(arguments: argparse.Namespace, scenes: bool) -> list[Metric]:
    from cat_pruning.evaluation.metrics import DEFAULT_METRICS, Metric

    if arguments.metrics is None:
        return [metric for metric in DEFAULT_METRICS if scenes or metric is not Metric.COVERAGE]
    if unknown := [name for name in arguments.metrics if name not in set(Metric)]:
        raise SettingsError(f"--metrics {', '.join(unknown)}: not known; known are {', '.join(Metric)}")
    return [Metric(name) for name in arguments.metrics]


def _methods(arguments: argparse.Namespace, bundle: Bundle) -> tuple[str, ...]:
    """The methods to compare.

    Raises:
        EngineError: AT-EDM was asked for and cannot run the model, or its attention cannot be seen.
    """
    from cat_pruning.evaluation.at_edm import AtEdmStepEngine, at_edm_family
    from cat_pruning.evaluation.methods import AT_EDM, METHODS, check_method
    from cat_pruning.families import family_named

    possible = arguments.engine in ("auto", "torch") and AtEdmStepEngine.supports(bundle.manifest.transformer_class)
    if arguments.methods is None:
        return tuple(method for method in METHODS if method != AT_EDM or possible)
    for method in arguments.methods:
        check_method(method)
    if AT_EDM in arguments.methods and not possible:
        at_edm_family(family_named(bundle.manifest.family, bundle.manifest.transformer_config))
        raise EngineError(
            f"--methods {AT_EDM}: it reads the first block's attention, which {arguments.engine} does not show",
            f"leave {AT_EDM} out, or take --engine torch",
        )
    return tuple(arguments.methods)


def _load(arguments: argparse.Namespace, bundle: Bundle) -> Generator:
    """The pipeline, and what makes AT-EDM's engine when it is needed."""
    import functools

    from cat_pruning.engines.torch_engine import TorchStepEngine
    from cat_pruning.evaluation.at_edm import AtEdmStepEngine
    from cat_pruning.evaluation.evaluate import Generator
    from cat_pruning.evaluation.solvers import SOLVERS, check_solver
    from cat_pruning.families import family_named
    from cat_pruning.runtime.engine_choice import engine_from_bundle
    from cat_pruning.runtime.pipeline import load_pipeline
    from cat_pruning.runtime.transformer import CatTransformer
    from cat_pruning.settings import Reuse

    manifest = bundle.manifest
    # The paper's in what the methods vary, whatever the bundle's defaults are.
    settings = manifest.settings.replace(refresh_every=0, schedule=None, reuse=Reuse.REPEAT)
    if arguments.full_steps is not None:
        settings = settings.replace(full_steps=arguments.full_steps)
    arguments.methods = _methods(arguments, bundle)
    pipe = load_pipeline(arguments.bundle, arguments.engine, settings=settings)
    pipe.set_progress_bar_config(disable=True)
    for method in arguments.methods:
        if method in SOLVERS:
            check_solver(method, pipe.scheduler)

    @functools.cache
    def at_edm() -> CatTransformer:
        engine = engine_from_bundle(bundle, "torch")
        assert isinstance(engine, TorchStepEngine)
        return CatTransformer(AtEdmStepEngine(engine.transformer), settings)

    text = family_named(manifest.family, manifest.transformer_config).pipeline_arguments(
        pipe, manifest.geometry.text_length
    )
    return Generator(pipe=pipe, transformer=pipe.transformer, at_edm=at_edm, settings=settings, text_arguments=text)


def _spec(
    arguments: argparse.Namespace, bundle: Bundle, generator: Generator, prompts: list[str], metrics: list[Metric]
) -> RunSpec:
    import inspect

    from cat_pruning.evaluation.results import RunSpec, machine
    from cat_pruning.evaluation.sweep import Sweep

    manifest, pipe = bundle.manifest, generator.pipe
    guidance = arguments.guidance_scale
    if guidance is None:
        guidance = inspect.signature(pipe.__call__).parameters["guidance_scale"].default
    height, width = arguments.resolution or (manifest.profiles[0].height, manifest.profiles[0].width)
    engine = generator.transformer.engine.name
    sweep = Sweep(
        bundle=bundle,
        height=height,
        width=width,
        guided=guidance > 1.0,
        settings=generator.settings,
        steps=arguments.steps,
        keep_ratios=arguments.keep_ratio,
        methods=arguments.methods,
        prompts=len(prompts),
        curve_prompts=arguments.curve_prompts,
        engine=engine,
    )
    return RunSpec(
        bundle=bundle.path.name,
        bundle_sha256=manifest.digest,
        engine=engine,
        prompts=tuple(prompts),
        prompts_source=arguments.prompts,
        seeds=arguments.seeds,
        batch=arguments.batch,
        sheet=min(arguments.sheet, len(prompts)),
        height=height,
        width=width,
        guidance_scale=float(guidance),
        metrics=tuple(metric.score for metric in metrics),
        settings=generator.settings.to_dict(),
        candidates=sweep.candidates(),
        machine=machine(),
    )


@contextmanager
def _progress(screen: Console, store: ResultStore) -> Iterator[Advance]:
    """A bar of images for the whole run, with the candidate that is at work; yields what `evaluate` calls."""
    total = sum(candidate.prompts for candidate in store.spec.candidates) * store.spec.seeds
    with progress(screen) as bar:
        task = bar.add_task("images", total=total)
        yield lambda candidate, count: bar.update(task, advance=count, description=candidate.key)


if __name__ == "__main__":
    sys.exit(main())
