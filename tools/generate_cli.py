"""`cat-generate`: pruned images from a bundle, compared with full ones and explained by pictures."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cat_pruning import console
from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.installation import require
from cat_pruning.names import ENGINES
from cat_pruning.schedule import StepKind
from cat_pruning.settings import Preset, PruneSettings, Reuse
from cat_pruning.timeline import step_kinds

if TYPE_CHECKING:
    from cat_pruning.bundle.manifest import Manifest
    from cat_pruning.tools.comparison import Comparison
    from cat_pruning.tools.generate import GenerateConfig, Run

_SETTINGS = ("keep_ratio", "full_steps", "refresh_every", "reuse")
_EXAMPLES = """\
examples:
  cat-generate build/sd3-mini "a large red circle above a small blue star on a plain black background" -o out.png
  cat-generate build/sd3-mini "…" -o out.png --compare --token-map         out.comparison.png, out.token_map.png
  cat-generate build/sd3-mini "…" -o out.png --preset forecast             nearest to the full run's picture on sd3-mini
  cat-generate build/sd3-mini "…" -o out.png --speedup 3                   by a schedule that cat-tune made
  cat-generate build/sd3-mini "…" "…" -o out.png --keep-ratio 0.5          two prompts, one batch: out-0.png, out-1.png
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `cat-generate`."""
    arguments = _parser().parse_args(argv)
    return console.run("cat-generate", lambda: _generate(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = console.Parser(
        prog="cat-generate",
        description="Generate images from a bundle that cat-export wrote, computing only the tokens worth computing.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="the bundle's directory")
    parser.add_argument("prompt", nargs="+", help="one or more prompts, generated as one batch")
    parser.add_argument("-o", "--out", type=Path, default=Path("out.png"), help="the image (default: out.png)")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="default: the bundle's plans if there are some for this machine's GPU, else ONNX Runtime",
    )
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel of a step by itself")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the pipeline's own)")
    parser.add_argument("--guidance-scale", type=float, help="default: the pipeline's own")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count on (default: 0)")
    parser.add_argument(
        "--resolution", type=console.resolution, metavar="HxW", help="pixels (default: the bundle's first)"
    )
    parser.add_argument(
        "--speedup", type=float, metavar="X", help="so many times as fast, by a schedule of the bundle: see cat-tune"
    )
    parser.add_argument(
        "--preset",
        choices=[*map(str, Preset)],  # argparse shows their repr
        help="settings that have a name; the next four options change them (default: the bundle's settings)",
    )
    parser.add_argument(
        "--keep-ratio", type=float, metavar="R", help="tokens of a pruned step, in [0, 1] (default: the bundle's)"
    )
    parser.add_argument(
        "--full-steps", type=int, metavar="F", help="full steps at the start, >= 2 (default: the bundle's)"
    )
    parser.add_argument(
        "--refresh-every",
        type=int,
        metavar="K",
        help="every K-th step after them is full too, 0: none (default: the bundle's)",
    )
    parser.add_argument(
        "--reuse", choices=[*map(str, Reuse)], help="what the other tokens contribute (default: the bundle's)"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also generate without pruning, same seed; print and draw both"
    )
    parser.add_argument("--token-map", action="store_true", help="draw which tokens every pruned step computed")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="with --compare: write the numbers as JSON")
    return parser


def _generate(arguments: argparse.Namespace) -> None:
    _check(arguments)
    terminal = Console(stderr=True)
    with console.collector_paused(), terminal.status("Import torch …") as status:
        from cat_pruning.bundle.bundle import Bundle
        from cat_pruning.families import family_named
        from cat_pruning.runtime.pipeline import load_pipeline
        from cat_pruning.tools.generate import GenerateConfig, generate, never_pruned

        console.quiet_libraries()
        bundle = Bundle.open(arguments.bundle)
        manifest = bundle.manifest
        settings = _settings(manifest, arguments)
        status.update("Load the bundle and import its pipeline …")
        graphs = not arguments.no_cuda_graphs
        pipe = load_pipeline(
            arguments.bundle,
            arguments.engine,
            settings=settings,
            speedup=arguments.speedup,
            steps=arguments.steps,
            cuda_graphs=graphs,
        )
        settings = pipe.transformer.settings
        pipe.set_progress_bar_config(disable=True)
    height, width = arguments.resolution or (manifest.profiles[0].height, manifest.profiles[0].width)
    config = GenerateConfig(
        prompts=tuple(arguments.prompt),
        height=height,
        width=width,
        steps=_given_or_default(arguments.steps, pipe, "num_inference_steps"),
        guidance_scale=_given_or_default(arguments.guidance_scale, pipe, "guidance_scale"),
        seed=arguments.seed,
        text_arguments=family_named(manifest.family, manifest.transformer_config).pipeline_arguments(
            pipe, manifest.geometry.text_length
        ),
    )
    _check_size(manifest, pipe, height, width)
    _note_other_guidance(terminal, settings, config.guidance_scale)
    kinds = step_kinds(config.steps, settings)
    if arguments.token_map and StepKind.FORECAST in kinds and StepKind.PRUNED not in kinds:
        raise SettingsError("--token-map: every step computes all tokens or none", "leave it out")
    if set(kinds) == {StepKind.FULL}:
        later = f", then one in {settings.refresh_every} (--refresh-every)" if settings.refresh_every else ""
        none = f"none of {config.steps} steps is pruned: the first {settings.full_steps} are full (--full-steps){later}"
        if arguments.token_map:
            raise SettingsError(f"--token-map: {none}", "give more --steps, or fewer full ones")
        terminal.print(f"[yellow]{none}[/]", highlight=False)
    elif not settings.keep_ratio and not settings.refresh_every and settings.schedule is None:
        terminal.print(
            f"[yellow]nothing is computed after the first {settings.full_steps} steps (--keep-ratio 0); "
            "give --refresh-every 2 --reuse extrapolate[/]",
            highlight=False,
        )
    full = None
    if arguments.compare:
        with terminal.status("Generate without pruning …"):
            warm_up = dataclasses.replace(config, steps=min(config.steps, settings.full_steps + 2))
            warm = settings if settings.schedule is None else never_pruned(settings, warm_up.steps)
            generate(pipe, warm, warm_up)  # so that neither run pays for the first one's allocations
            full = generate(pipe, never_pruned(settings, config.steps), config)
    with terminal.status("Generate …"):
        pruned = generate(pipe, settings, config)
    _save(arguments, pruned)
    if full is not None:
        from cat_pruning.tools.comparison import summarise

        comparison = summarise(bundle, pipe.transformer.engine.name, settings, config, full, pruned)
        _compare(arguments, settings, config, comparison, full, pruned)
    if arguments.token_map:
        _draw_token_map(arguments.out, pruned)


def _check(arguments: argparse.Namespace) -> None:
    """What needs no bundle, before the seconds that torch takes to import."""
    if arguments.steps is not None and arguments.steps < 1:
        raise SettingsError(f"--steps {arguments.steps}: expected a number >= 1")
    if arguments.guidance_scale is not None and not math.isfinite(arguments.guidance_scale):
        raise SettingsError(f"--guidance-scale {arguments.guidance_scale}: expected a finite number")
    if not 0 <= arguments.seed < 2**63:
        raise SettingsError(f"--seed {arguments.seed}: expected a number in [0, 2^63)")
    if any(not prompt.strip() for prompt in arguments.prompt):
        raise SettingsError("an empty prompt", "say what to draw")
    if arguments.speedup is not None:
        if not arguments.speedup >= 1.0:
            raise SettingsError(f"--speedup {arguments.speedup:g}: expected a number >= 1")
        if given := [name for name in ("preset", *_SETTINGS) if getattr(arguments, name) is not None]:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise SettingsError(f"--speedup goes with no {options}: the schedule says what each step computes")
    if arguments.out.suffix.lower() != ".png":
        raise SettingsError(f"--out {arguments.out}: expected a name that ends in .png")
    if not arguments.out.parent.is_dir():
        raise OutputError(
            f"--out {arguments.out}: the directory {arguments.out.parent} does not exist", "make it first"
        )
    if arguments.summary is not None and not arguments.compare:
        raise SettingsError("--summary needs --compare, which measures what it holds")
    if arguments.compare:
        require("--compare", "export", "pictures")
    if arguments.token_map:
        require("--token-map", "pictures")


def _settings(manifest: Manifest, arguments: argparse.Namespace) -> PruneSettings | None:
    """The settings; None where a schedule of the bundle says what is computed."""
    if arguments.speedup is not None:
        return None
    settings = PruneSettings.preset(arguments.preset) if arguments.preset else manifest.settings
    changes = {name: getattr(arguments, name) for name in _SETTINGS}
    return settings.replace(**{name: value for name, value in changes.items() if value is not None})


def _note_other_guidance(terminal: Console, settings: PruneSettings, guidance_scale: float) -> None:
    made_for = settings.schedule.made_for if settings.schedule else None
    if made_for is not None and made_for.guidance_scale != guidance_scale:
        terminal.print(
            f"[yellow]the schedule was tuned at --guidance-scale {made_for.guidance_scale:g}; at {guidance_scale:g} "
            "its images may differ more from the full run's[/]",
            highlight=False,
        )


def _given_or_default(given: Any, pipe: Any, parameter: str) -> Any:
    """An argument of the command line, or the default of the pipeline's own call."""
    return given if given is not None else inspect.signature(pipe.__call__).parameters[parameter].default


def _check_size(manifest: Manifest, pipe: Any, height: int, width: int) -> None:
    """Told here in pixels, before the text encoders run."""
    from cat_pruning.bundle.profiles import profile_spec

    profile_spec(
        height, width, 1, geometry=manifest.geometry, settings=pipe.transformer.settings, guidance=manifest.guidance
    )


def _save(arguments: argparse.Namespace, run: Run) -> None:
    for index, image in enumerate(run.images):
        path = arguments.out if len(run.images) == 1 else _beside(arguments.out, f"-{index}.png")
        try:
            image.save(path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror or error})", "give another --out") from error
        Console().print(f"{path}  {run.seconds:.2f} s", highlight=False)


def _compare(
    arguments: argparse.Namespace,
    settings: PruneSettings,
    config: GenerateConfig,
    comparison: Comparison,
    full: Run,
    pruned: Run,
) -> None:
    """Print and draw two runs side by side."""
    from cat_pruning.tools.comparison import write_summary
    from cat_pruning.tools.pictures import draw_comparison

    table = Table(title="full against pruned, same seed", title_justify="left", title_style="bold")
    for column in ("", "image", "full step", "pruned step", "MACs of the image"):
        table.add_column(column, justify="right" if column else "left")
    for name, run, cost in (("full", full, comparison.full_macs), ("pruned", pruned, comparison.pruned_macs)):
        medians = [run.median_ms(full=is_full) for is_full in (True, False)]
        times = [f"{ms:.1f} ms" if ms is not None else "–" for ms in medians]
        table.add_row(name, f"{run.seconds:.2f} s", *times, console.macs(cost))
    Console().print(table)
    Console().print(
        f"step {comparison.step_speedup_text} (bound by MACs {comparison.mac_bound_text}), "
        f"image {full.seconds / pruned.seconds:.2f}×, PSNR {comparison.psnr_text}",
        highlight=False,
    )
    panels = []
    for index in range(len(full.images)):
        panels.append((full.images[index], f"full · {config.steps} steps · {full.seconds:.2f} s"))
        caption = f"{_what_is_left_out(config, settings)} · {pruned.seconds:.2f} s · {comparison.psnr_db[index]:.1f} dB"
        panels.append((pruned.images[index], caption))
    draw_comparison(panels, _beside(arguments.out, ".comparison.png"))
    Console().print(f"{_beside(arguments.out, '.comparison.png')}")
    if arguments.summary is not None:
        write_summary(comparison, arguments.summary)


def _what_is_left_out(config: GenerateConfig, settings: PruneSettings) -> str:
    if settings.prunes:
        return f"pruned, keep {settings.keep_ratio:g}"
    full = step_kinds(config.steps, settings).count(StepKind.FULL)
    return f"{full} of {config.steps} steps computed"


def _draw_token_map(out: Path, run: Run) -> None:
    from cat_pruning.tools.pictures import draw_token_map

    path = _beside(out, ".token_map.png")
    draw_token_map(run.records, path, run.images[-1])
    Console().print(f"{path}")


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.stem + ending)


if __name__ == "__main__":
    sys.exit(main())
