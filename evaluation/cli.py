"""`cat-eval`: what pruning does to the picture, against the full run, other methods and fewer steps."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cat_pruning import console
from cat_pruning.errors import EngineError, SettingsError
from cat_pruning.evaluation.arguments import check, cluster_of, parse
from cat_pruning.installation import require
from cat_pruning.terminal import progress, say, terminal, waiting

if TYPE_CHECKING:
    from rich.console import Console

    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.evaluation.about import About
    from cat_pruning.evaluation.evaluate import Advance
    from cat_pruning.evaluation.metrics import Metric
    from cat_pruning.evaluation.results import ResultStore, RunSpec
    from cat_pruning.evaluation.worker import Recipe
    from cat_pruning.models.prompts import Prompt


def main(argv: list[str] | None = None) -> int:
    """Entry point of `cat-eval`."""
    again = "what is done is kept; start it again in the same way and it goes on"
    return console.run("cat-eval", lambda: _evaluate(parse(argv)), again)


def _evaluate(arguments: argparse.Namespace) -> None:
    check(arguments)
    require("cat-eval", "eval")
    console.check_address_space()
    from cat_pruning.bundle.outside import check_directory_outside
    from cat_pruning.evaluation.evaluate import evaluate
    from cat_pruning.evaluation.place import alone
    from cat_pruning.evaluation.pool import pool_of
    from cat_pruning.evaluation.quantized import open_quantized
    from cat_pruning.evaluation.report import write_report
    from cat_pruning.evaluation.results import ResultStore, clear, existing_spec
    from cat_pruning.models.prompts import load_prompts
    from cat_pruning.runtime.engine_choice import open_signed

    console.quiet_libraries()
    screen = terminal(stderr=True)
    check_directory_outside("--out", arguments.out)
    existing_spec(arguments.out, force=arguments.force)  # before the bundle is loaded
    prompts = load_prompts(arguments.prompts, arguments.limit)
    bundle = open_signed(arguments.bundle, arguments.public_key, arguments.engine)
    quantized = open_quantized(arguments.quantized, bundle, arguments.public_key, arguments.engine)
    recipe = _recipe(arguments, bundle, prompts)
    with ExitStack() as stack:
        with waiting(screen, "Load the bundle …") as status:
            pool = stack.enter_context(
                pool_of(recipe, cluster_of(arguments), status.update, lambda line: say(line, to=screen))
            )
        pool.about.check(bundle, [*quantized.values()])
        spec = _spec(arguments, bundle, recipe, pool.about)
        stack.enter_context(alone(arguments.out))
        if arguments.force:
            clear(arguments.out)
        store = ResultStore(arguments.out, spec)
        if store.added:
            say(f"{arguments.out} grows: {', '.join(store.added)}", to=screen)
        with _progress(screen, store) as advance:
            evaluate(store, prompts, pool, advance)
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
        SettingsError: a method is not known, or AT-EDM was asked for with a public key.
    """
    from cat_pruning.evaluation.at_edm import AtEdmStepEngine, at_edm_family
    from cat_pruning.evaluation.methods import AT_EDM, METHODS, check_method
    from cat_pruning.families import family_named

    seen = arguments.engine in ("auto", "torch") and arguments.public_key is None
    possible = seen and AtEdmStepEngine.supports(bundle.manifest.transformer_class)
    if arguments.methods is None:
        return tuple(method for method in METHODS if method != AT_EDM or possible)
    for method in arguments.methods:
        check_method(method)
    if AT_EDM in arguments.methods and arguments.public_key is not None:
        raise SettingsError(
            f"--methods {AT_EDM} and --public-key: it loads the checkpoint, which is not in the bundle and not signed",
            "leave out one of them",
        )
    if AT_EDM in arguments.methods and not possible:
        at_edm_family(family_named(bundle.manifest.family, bundle.manifest.transformer_config))
        raise EngineError(
            f"--methods {AT_EDM}: it reads the first block's attention, which {arguments.engine} does not show",
            f"leave {AT_EDM} out, or take --engine torch",
        )
    return tuple(arguments.methods)


def _recipe(arguments: argparse.Namespace, bundle: Bundle, prompts: list[Prompt]) -> Recipe:
    """How a worker loads the pipeline, and what it measures; paths are absolute, because it may be elsewhere."""
    from cat_pruning.bundle.places import is_url
    from cat_pruning.evaluation.clip_score import DEFAULT_CLIP_MODEL
    from cat_pruning.evaluation.worker import Recipe
    from cat_pruning.settings import Reuse

    # The paper's in what the methods vary, whatever the bundle's defaults are.
    settings = bundle.manifest.settings.replace(refresh_every=0, schedule=None, reuse=Reuse.REPEAT)
    if arguments.full_steps is not None:
        settings = settings.replace(full_steps=arguments.full_steps)
    bundles = [each if is_url(each) else each.absolute() for each in (arguments.bundle, *arguments.quantized)]
    clip_model, weights, key = arguments.clip_model, arguments.lpips_weights, arguments.public_key
    if clip_model is not None and os.path.isdir(clip_model):  # noqa: PTH112  # Path's raises where a name is too long
        clip_model = str(Path(clip_model).absolute())
    return Recipe(
        bundle=bundles[0],
        quantized=tuple(bundles[1:]),
        public_key=None if key is None else key.absolute(),
        engine=arguments.engine,
        settings=settings,
        methods=_methods(arguments, bundle),
        metrics=tuple(_metrics(arguments, all(prompt.scene is not None for prompt in prompts))),
        prompts=tuple(prompts),
        clip_model=clip_model or DEFAULT_CLIP_MODEL,
        lpips_weights=None if weights is None else weights.absolute(),
    )


def _spec(arguments: argparse.Namespace, bundle: Bundle, recipe: Recipe, about: About) -> RunSpec:
    from cat_pruning.evaluation.results import RunSpec
    from cat_pruning.evaluation.sweep import Sweep

    manifest = bundle.manifest
    guidance = about.guidance_scale if arguments.guidance_scale is None else arguments.guidance_scale
    height, width = arguments.resolution or (manifest.profiles[0].height, manifest.profiles[0].width)
    prompts = tuple(prompt.text for prompt in recipe.prompts)
    sweep = Sweep(
        bundle=bundle,
        height=height,
        width=width,
        guided=guidance > 1.0,
        settings=recipe.settings,
        steps=arguments.steps,
        keep_ratios=arguments.keep_ratio,
        methods=recipe.methods,
        prompts=len(prompts),
        curve_prompts=arguments.curve_prompts,
        engine=about.engine,
        quantized=about.quantized,
    )
    return RunSpec(
        bundle=bundle.path.name,
        bundle_sha256=manifest.digest,
        engine=about.engine,
        prompts=prompts,
        prompts_source=arguments.prompts,
        seeds=arguments.seeds,
        batch=arguments.batch,
        sheet=min(arguments.sheet, len(prompts)),
        height=height,
        width=width,
        guidance_scale=float(guidance),
        metrics=tuple(metric.score for metric in recipe.metrics),
        settings=recipe.settings.to_dict(),
        candidates=sweep.candidates(),
        machine=about.machine,
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
