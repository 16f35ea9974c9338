"""`cat-eval`: what pruning does to the picture, against the full run, other policies and fewer steps."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cat_pruning import console
from cat_pruning.errors import EngineError, OutputError, SettingsError
from cat_pruning.installation import require

if TYPE_CHECKING:
    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.evaluation.evaluate import Generator
    from cat_pruning.evaluation.metrics import Metric
    from cat_pruning.evaluation.results import ResultStore, RunSpec

_T = TypeVar("_T")
_EXAMPLES = """\
examples:
  cat-eval build/sd3-mini --guidance-scale 3 --out build/eval                          the miniature, on its own scenes
  cat-eval build/sd3-mini --guidance-scale 3 --out build/quick --quick                 the same in a minute or two
  cat-eval sd3 --prompts PartiPrompts.tsv --steps 28,50 --metrics clip,psnr,ssim --out parti
  cat-eval sd3 --prompts captions.json --limit 500 --metrics clip --policies cat,at-edm --engine torch --out coco

Interrupted, it goes on where it was when it is started again in the same way. Started again with other policies, ratios
or schedules, or with more --curve-prompts, it adds them to what --out holds; the first policy, ratio and schedule that
it is told then are run on all prompts, too.
"""
# What --quick takes where nothing is given, and what is taken else.
_QUICK = {"prompts": "scenes:4", "steps": (28,), "keep_ratio": (0.3,), "curve_prompts": 4, "sheet": 4}
_DEFAULT = {"prompts": "scenes:64", "steps": (28,), "keep_ratio": (0.3,), "curve_prompts": 64, "sheet": 6}


def main(argv: list[str] | None = None) -> int:
    """Entry point of `cat-eval`."""
    arguments = _parser().parse_args(argv)
    again = "what is done is kept; start it again in the same way and it goes on"
    return console.run("cat-eval", lambda: _evaluate(arguments), again)


def _parser() -> argparse.ArgumentParser:
    parser = console.Parser(
        prog="cat-eval",
        description="Compare pruned images with full ones, other policies and fewer steps; write an HTML report.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="a bundle that cat-export wrote")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results and of report.html")
    parser.add_argument(
        "--prompts",
        metavar="FILE|scenes:N",
        help="a line each, PartiPrompts' .tsv or COCO's captions .json; or N scenes that the miniatures were not "
        "trained on (default: scenes:64)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts only")
    parser.add_argument(
        "--curve-prompts",
        type=int,
        metavar="N",
        help="prompts of all but the main comparison, which is the first policy (and the forecast), ratio and "
        "schedule against full and fewer steps (default: 64)",
    )
    parser.add_argument("--steps", type=_numbers(int), metavar="S,…", help="schedules (default: 28)")
    parser.add_argument("--keep-ratio", type=_numbers(float), metavar="R,…", help="in (0, 1] (default: 0.3)")
    parser.add_argument("--full-steps", type=int, metavar="F", help="full steps at the start (default: the bundle's)")
    parser.add_argument(
        "--policies",
        type=_numbers(str),
        metavar="P,…",
        help="cat, noise, cluster, stale, random, ras, with +extrapolate or +refresh after it; forecast, at-edm "
        "(default: all and cat+refresh, at-edm where the model and the engine allow it)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="images of each prompt (default: 1)")
    parser.add_argument(
        "--metrics",
        type=_numbers(str),
        metavar="M,…",
        help="psnr, ssim, latents: against the full run; scene, clip: against the prompt "
        "(default: all but clip, scene where every prompt is one)",
    )
    parser.add_argument(
        "--clip-model", metavar="ID|DIR", help="of the CLIP score (default: openai/clip-vit-base-patch16)"
    )
    parser.add_argument(
        "--engine", choices=["auto", "tensorrt", "tensorrt_rtx", "onnxruntime", "torch"], default="auto"
    )
    parser.add_argument("--guidance-scale", type=float, help="default: the pipeline's own")
    parser.add_argument("--resolution", type=console.resolution, metavar="HxW", help="pixels (default: the bundle's)")
    parser.add_argument("--batch", type=int, default=8, help="prompts at once (default: 8)")
    parser.add_argument("--sheet", type=int, metavar="N", help="prompts whose images the report shows (default: 6)")
    parser.add_argument("--quick", action="store_true", help="four scenes, where nothing else is said")
    parser.add_argument("--force", action="store_true", help="begin anew if --out holds an evaluation")
    return parser


def _numbers(kind: Callable[[str], _T]) -> Callable[[str], tuple[_T, ...]]:
    def parse(text: str) -> tuple[_T, ...]:
        try:
            values = tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: expected values with commas between ({error})") from error
        if "" in values:
            raise argparse.ArgumentTypeError(f"{text!r}: an empty value")
        return values

    return parse


def _evaluate(arguments: argparse.Namespace) -> None:
    for name, value in (_QUICK if arguments.quick else _DEFAULT).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    _check(arguments)
    require("cat-eval", "eval")
    from rich.console import Console

    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.evaluation.clip_score import DEFAULT_CLIP_MODEL
    from cat_pruning.evaluation.evaluate import evaluate
    from cat_pruning.evaluation.metrics import Metrics
    from cat_pruning.evaluation.prompts import load_prompts
    from cat_pruning.evaluation.report import check_installed, write_report
    from cat_pruning.evaluation.results import ResultStore, alone

    console.quiet_libraries()
    terminal = Console(stderr=True)
    check_installed()
    prompts = load_prompts(arguments.prompts, arguments.limit)
    bundle = Bundle.open(arguments.bundle)
    metrics = _metrics(arguments, all(prompt.scene is not None for prompt in prompts))
    scorer = Metrics(metrics, prompts, arguments.clip_model or DEFAULT_CLIP_MODEL)
    with terminal.status("Load the bundle …"):
        generator = _load(arguments, bundle)
    spec = _spec(arguments, bundle, generator, [prompt.text for prompt in prompts], metrics)
    with alone(arguments.out):
        if arguments.force:
            _clear(arguments.out)
        store = ResultStore(arguments.out, spec)
        if store.added:
            terminal.print(f"{arguments.out} grows: {', '.join(store.added)}", highlight=False)
        with _progress(terminal, store) as advance:
            evaluate(store, prompts, scorer, generator, advance)
        Console().print(str(write_report(arguments.out)), highlight=False)


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("curve_prompts", 1), ("seeds", 1), ("batch", 1), ("sheet", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise SettingsError(f"--{name.replace('_', '-')} {value}: expected a number >= {least}")
    if any(steps < 1 for steps in arguments.steps):
        raise SettingsError(f"--steps {','.join(map(str, arguments.steps))}: expected numbers >= 1")
    if 0.0 in arguments.keep_ratio:
        raise SettingsError(
            "--keep-ratio 0: expected numbers in (0, 1]", "for pruned steps that compute nothing, --policies forecast"
        )
    if arguments.out.exists() and not arguments.out.is_dir():
        raise OutputError(f"--out {arguments.out} is no directory", "give another")


def _metrics(arguments: argparse.Namespace, scenes: bool) -> list[Metric]:
    from cat_pruning.evaluation.metrics import Metric

    if arguments.metrics is None:
        return [metric for metric in Metric if metric is not Metric.CLIP and (scenes or metric is not Metric.SCENE)]
    if unknown := [name for name in arguments.metrics if name not in set(Metric)]:
        raise SettingsError(f"--metrics {', '.join(unknown)}: not known; known are {', '.join(Metric)}")
    return [Metric(name) for name in arguments.metrics]


def _methods(arguments: argparse.Namespace, bundle: Bundle) -> tuple[str, ...]:
    """The policies to compare.

    Raises:
        EngineError: AT-EDM was asked for where attention cannot be seen.
    """
    from cat_pruning.evaluation.at_edm import AtEdmStepEngine
    from cat_pruning.evaluation.methods import AT_EDM, METHODS, check_method

    possible = arguments.engine in ("auto", "torch") and AtEdmStepEngine.supports(bundle.manifest.transformer_class)
    if arguments.policies is None:
        return tuple(method for method in METHODS if method != AT_EDM or possible)
    for method in arguments.policies:
        check_method(method)
    if AT_EDM in arguments.policies and not possible:
        raise EngineError(
            f"--policies {AT_EDM} reads the first block's attention, which the torch engine alone shows, for SD3 and "
            f"PixArt",
            f"here are --engine {arguments.engine} and {bundle.manifest.family}: leave {AT_EDM} out, or take "
            "--engine torch",
        )
    return tuple(arguments.policies)


def _load(arguments: argparse.Namespace, bundle: Bundle) -> Generator:
    """The pipeline, and what makes AT-EDM's engine when it is needed."""
    import functools

    from cat_pruning.engines.torch_engine import TorchStepEngine
    from cat_pruning.evaluation.at_edm import AtEdmStepEngine
    from cat_pruning.evaluation.evaluate import Generator
    from cat_pruning.families import family_named
    from cat_pruning.runtime.engine_choice import engine_from_bundle
    from cat_pruning.runtime.pipeline import load_pipeline
    from cat_pruning.runtime.transformer import CatTransformer
    from cat_pruning.settings import Reuse

    manifest = bundle.manifest
    # The paper's in what the methods vary, whatever the bundle's defaults are.
    settings = manifest.settings.replace(refresh_every=0, extra_full_steps=(), reuse=Reuse.REPEAT)
    if arguments.full_steps is not None:
        settings = settings.replace(full_steps=arguments.full_steps)
    arguments.policies = _methods(arguments, bundle)
    pipe = load_pipeline(arguments.bundle, arguments.engine, settings=settings)
    pipe.set_progress_bar_config(disable=True)

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

    from cat_pruning.bundle.manifest import MANIFEST_NAME
    from cat_pruning.evaluation.plan import Plan
    from cat_pruning.evaluation.results import RunSpec, machine, sha256

    manifest, pipe = bundle.manifest, generator.pipe
    guidance = arguments.guidance_scale
    if guidance is None:
        guidance = inspect.signature(pipe.__call__).parameters["guidance_scale"].default
    height, width = arguments.resolution or (manifest.profiles[0].height, manifest.profiles[0].width)
    engine = generator.transformer.engine.name
    plan = Plan(
        bundle=bundle,
        height=height,
        width=width,
        guided=guidance > 1.0,
        settings=generator.settings,
        steps=arguments.steps,
        keep_ratios=arguments.keep_ratio,
        methods=arguments.policies,
        prompts=len(prompts),
        curve_prompts=arguments.curve_prompts,
        engine=engine,
    )
    return RunSpec(
        bundle=arguments.bundle.resolve().name,
        bundle_sha256=sha256(bundle.path / MANIFEST_NAME),
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
        variants=plan.variants(),
        machine=machine(),
    )


def _clear(directory: Path) -> None:
    """Remove an evaluation, and nothing else."""
    from cat_pruning.evaluation.results import IMAGES, REPORT, RESULTS, RUN, TOKENS

    for name in (RUN, RESULTS, REPORT):
        (directory / name).unlink(missing_ok=True)
    for name in (IMAGES, TOKENS):
        shutil.rmtree(directory / name, ignore_errors=True)


def _progress(terminal: Any, store: ResultStore) -> Any:
    """A bar of images for the whole run, with the variant that is at work; yields what `evaluate` calls."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bar() -> Any:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        total = sum(variant.prompts for variant in store.spec.variants) * store.spec.seeds
        with Progress(*columns, console=terminal) as progress:
            task = progress.add_task("images", total=total)
            yield lambda variant, count: progress.update(task, advance=count, description=variant.key)

    return bar()


if __name__ == "__main__":
    sys.exit(main())
