"""`cat-generate`: pruned images from a bundle, compared with full ones and explained by pictures."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cat_pruning import console
from cat_pruning.arguments import shown
from cat_pruning.errors import SettingsError
from cat_pruning.schedule import StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.terminal import say, terminal, waiting
from cat_pruning.timeline import step_kinds
from cat_pruning.tools.generate_arguments import SETTINGS, beside, check, images_of, outputs_of, parse
from cat_pruning.tools.image_files import save_image

if TYPE_CHECKING:
    from rich.console import Console

    from cat_pruning.bundle.manifest import Manifest
    from cat_pruning.tools.comparison import Comparison
    from cat_pruning.tools.generate import GenerateConfig, Run


def main(argv: list[str] | None = None) -> int:
    """Entry point of `cat-generate`."""
    return console.run("cat-generate", lambda: _generate(parse(argv)))


def _generate(arguments: argparse.Namespace) -> None:
    check(arguments)
    console.check_address_space()
    screen = terminal(stderr=True)
    with console.collector_paused(), waiting(screen, "Import torch …") as status:
        from cat_pruning.bundle.outside import check_outside
        from cat_pruning.bundle.places import is_url
        from cat_pruning.families import family_named
        from cat_pruning.runtime.engine_choice import open_signed
        from cat_pruning.runtime.pipeline import load_pipeline
        from cat_pruning.tools.generate import GenerateConfig, generate, never_pruned

        console.quiet_libraries()
        check_outside(outputs_of(arguments))
        if is_url(arguments.bundle):
            status.update("Look for the bundle, and pull it if there is no copy …")
        bundle = open_signed(arguments.bundle, arguments.public_key, arguments.engine)
        manifest = bundle.manifest
        settings = _settings(manifest, arguments)
        status.update("Load the bundle and import its pipeline …")
        graphs = not arguments.no_cuda_graphs
        pipe = load_pipeline(
            bundle.path,
            arguments.engine,
            settings=settings,
            speedup=arguments.speedup,
            steps=arguments.steps,
            cuda_graphs=graphs,
            public_key=arguments.public_key,
            offload=arguments.offload,
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
    _note_cut_prompts(screen, pipe, config)
    _note_other_guidance(screen, settings, config.guidance_scale)
    kinds = step_kinds(config.steps, settings)
    if arguments.token_map and StepKind.FORECAST in kinds and StepKind.PRUNED not in kinds:
        raise SettingsError("--token-map: every step computes all tokens or none", "leave it out")
    if set(kinds) == {StepKind.FULL}:
        later = f", then one in {settings.refresh_every} (--refresh-every)" if settings.refresh_every else ""
        none = f"none of {config.steps} steps is pruned: the first {settings.full_steps} are full (--full-steps){later}"
        if arguments.token_map:
            raise SettingsError(f"--token-map: {none}", "give more --steps, or fewer full ones")
        _note(screen, none)
    elif not settings.keep_ratio and not settings.refresh_every and settings.schedule is None:
        _note(
            screen,
            f"nothing is computed after the first {settings.full_steps} steps (--keep-ratio 0); "
            "give --refresh-every 2 --reuse extrapolate",
        )
    full = None
    if arguments.compare:
        with waiting(screen, "Generate without pruning …"):
            warm_up = dataclasses.replace(config, steps=min(config.steps, settings.full_steps + 2))
            warm = settings if settings.schedule is None else never_pruned(settings, warm_up.steps)
            generate(pipe, warm, warm_up)  # so that neither run pays for the first one's allocations
            full = generate(pipe, never_pruned(settings, config.steps), config)
    with waiting(screen, "Generate …"):
        pruned = generate(pipe, settings, config)
    _save(arguments, pruned)
    if arguments.timing:
        _tell_times(pruned)
    if full is not None:
        from cat_pruning.tools.comparison import summarise

        comparison = summarise(bundle, pipe.transformer.engine.name, settings, config, full, pruned)
        _compare(arguments, settings, config, comparison, full, pruned)
    if arguments.token_map:
        _draw_token_map(arguments.out, pruned)


def _settings(manifest: Manifest, arguments: argparse.Namespace) -> PruneSettings | None:
    """The settings; None where a schedule of the bundle says what is computed."""
    if arguments.speedup is not None:
        return None
    settings = PruneSettings.preset(arguments.preset) if arguments.preset else manifest.settings
    changes = {name: getattr(arguments, name) for name in SETTINGS}
    return settings.replace(**{name: value for name, value in changes.items() if value is not None})


def _note(screen: Console, line: str) -> None:
    say(line, to=screen, style="yellow")


def _note_other_guidance(screen: Console, settings: PruneSettings, guidance_scale: float) -> None:
    made_for = settings.schedule.made_for if settings.schedule else None
    if made_for is not None and made_for.guidance_scale != guidance_scale:
        _note(
            screen,
            f"the schedule was tuned at --guidance-scale {made_for.guidance_scale:g}; at {guidance_scale:g} "
            "its images may differ more from the full run's",
        )


def _note_cut_prompts(screen: Console, pipe: Any, config: GenerateConfig) -> None:
    """Say of a prompt that the encoder which reads most of it does not read to its end."""
    there = (name for name in ("tokenizer_3", "tokenizer_2", "tokenizer") if getattr(pipe, name, None) is not None)
    if (name := next(there, None)) is None:
        return
    encoder, longest = getattr(pipe, name.replace("tokenizer", "text_encoder")), "max_position_embeddings"
    room = getattr(encoder.config, longest, None) or config.text_arguments.get("max_sequence_length")
    for prompt in config.prompts:
        tokens = len(getattr(pipe, name)(prompt, verbose=False).input_ids)
        if room is not None and tokens > room:
            _note(screen, f"the prompt {shown(prompt)} has {tokens} tokens, of which the text encoder reads {room}")


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
    for path, image in zip(images_of(arguments), run.images, strict=True):
        save_image(image, path)
        say(f"{path}  {run.seconds:.2f} s")


def _tell_times(run: Run) -> None:
    """How long each stage of an image took, with that of the first image in a process: weights that are read."""
    names = {"encode": "prompts", "steps": f"{len(run.records)} steps", "decode": "decoding"}
    say(", ".join(f"{names[stage]} {seconds * 1e3:,.0f} ms" for stage, seconds in run.stage_seconds.items()))


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
    terminal().print(table)
    say(
        f"step {comparison.step_speedup_text} (bound by MACs {comparison.mac_bound_text}), "
        f"image {full.seconds / pruned.seconds:.2f}×, PSNR {comparison.psnr_text}"
    )
    panels = []
    for index in range(len(full.images)):
        panels.append((full.images[index], f"full · {config.steps} steps · {full.seconds:.2f} s"))
        caption = f"{_what_is_left_out(config, settings)} · {pruned.seconds:.2f} s · {comparison.psnr_db[index]:.1f} dB"
        panels.append((pruned.images[index], caption))
    draw_comparison(panels, beside(arguments.out, ".comparison.png"))
    say(f"{beside(arguments.out, '.comparison.png')}")
    if arguments.summary is not None:
        write_summary(comparison, arguments.summary)


def _what_is_left_out(config: GenerateConfig, settings: PruneSettings) -> str:
    if settings.prunes:
        return f"pruned, keep {settings.keep_ratio:g}"
    full = step_kinds(config.steps, settings).count(StepKind.FULL)
    return f"{full} of {config.steps} steps computed"


def _draw_token_map(out: Path, run: Run) -> None:
    from cat_pruning.tools.pictures import draw_token_map

    path = beside(out, ".token_map.png")
    draw_token_map(run.records, path, run.images[-1])
    say(f"{path}")


if __name__ == "__main__":
    sys.exit(main())
