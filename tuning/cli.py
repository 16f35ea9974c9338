"""`cat-tune`: schedules fitted to a bundle's model, measured, and put into the bundle."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cat_pruning import console
from cat_pruning.arguments import check_outputs
from cat_pruning.errors import SettingsError
from cat_pruning.installation import require
from cat_pruning.terminal import progress, say, terminal, waiting
from cat_pruning.tuning.arguments import budgets_of, check, parse

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.evaluation.prompts import Prompt
    from cat_pruning.schedule import Schedule
    from cat_pruning.tuning.job import Job
    from cat_pruning.tuning.measure import Outcome


def main(argv: list[str] | None = None) -> int:
    """Entry point of `cat-tune`."""
    again = "the bundle is as it was; recordings are kept, start it again in the same way and it goes on"
    return console.run("cat-tune", lambda: _tune(parse(argv)), again)


def _tune(arguments: argparse.Namespace) -> None:
    check(arguments)
    require("cat-tune", "eval")
    console.check_address_space()
    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.bundle.manifest import MANIFEST_NAME
    from cat_pruning.bundle.outside import check_directory_outside
    from cat_pruning.bundle.schedules import write_schedules
    from cat_pruning.evaluation.prompts import load_prompts, tuning_prompts
    from cat_pruning.tuning.recorder import NUMBERS, PICTURE, existing_run, forget
    from cat_pruning.tuning.report import draw, table, to_json, write_json

    console.quiet_libraries()
    screen = terminal(stderr=True)
    prompts, others = tuning_prompts(arguments.prompts), load_prompts(arguments.measure)
    _check_prompts(arguments, prompts, others)
    bundle = Bundle.open(arguments.bundle)
    directory = arguments.recordings or bundle.path.with_name(f"{bundle.path.name}.tune")
    check_directory_outside("--recordings", directory)
    # Before the bundle is loaded, and the hour that recording takes.
    check_outputs([("the bundle's", bundle.path / MANIFEST_NAME)])
    existing_run(directory, force=arguments.force)
    with waiting(screen, "Load the bundle …"):
        job = _job(arguments, bundle, directory)
        console.quiet_libraries()  # diffusers sets its own level when it is imported
    budgets = budgets_of(arguments, job.steps, job.speed)
    if arguments.force:
        forget(directory)
    with _progress(screen) as advance:
        schedules, expected = job.tune(prompts, budgets, advance)
        outcomes = job.measure(others, schedules, advance, peers=not arguments.no_peers)
    full, *compared = outcomes
    measured = _with_measures(schedules, expected, compared, job)
    write_json(
        {
            "steps": job.steps,
            "guidance_scale": job.guidance_scale,
            "fitted_to": len(prompts),
            "measured_on": len(others),
            "expected_error": expected,
            "full_steps": {str(len(each.full_steps)): each.full_steps for each in measured},
            "outcomes": to_json(outcomes),
            "machine": job.machine(),
        },
        directory / NUMBERS,
    )
    draw(compared, full.contender.macs, directory / PICTURE)
    write_schedules(bundle.path, measured, digest=bundle.manifest.digest)
    terminal().print(table(compared, full))
    say(f"{directory / PICTURE}")
    names = ", ".join(each.name for each in measured)
    say(f"in {bundle.path} now: {names}; cat-generate --speedup takes them")


def _check_prompts(arguments: argparse.Namespace, prompts: Sequence[Prompt], others: Sequence[Prompt]) -> None:
    if len(prompts) < 4:
        raise SettingsError(
            f"--prompts {arguments.prompts}: {len(prompts)} prompts; expected at least 4 to fit to", "give more, or 24"
        )
    if shared := {prompt.text for prompt in prompts} & {prompt.text for prompt in others}:
        raise SettingsError(
            f"--measure {arguments.measure}: {len(shared)} of its prompts are fitted to as well",
            "measure on other prompts",
        )


def _job(arguments: argparse.Namespace, bundle: Bundle, directory: Path) -> Job:
    from cat_pruning.bundle.profiles import profile_spec
    from cat_pruning.families import family_named
    from cat_pruning.runtime.pipeline import load_pipeline
    from cat_pruning.settings import PruneSettings
    from cat_pruning.tuning.job import Job

    manifest = bundle.manifest
    pipe = load_pipeline(bundle.path, arguments.engine, settings=PruneSettings())
    pipe.set_progress_bar_config(disable=True)
    if arguments.scheduler is not None:
        pipe.scheduler = _scheduler(arguments.scheduler, pipe.scheduler)
    defaults = inspect.signature(pipe.__call__).parameters
    height, width = arguments.resolution or (manifest.profiles[0].height, manifest.profiles[0].width)
    # Told here in pixels, before the text encoders run.
    profile_spec(height, width, 1, geometry=manifest.geometry, settings=PruneSettings(), guidance=manifest.guidance)
    guidance = arguments.guidance_scale
    return Job(
        bundle=bundle,
        pipe=pipe,
        directory=directory,
        steps=arguments.steps or defaults["num_inference_steps"].default,
        guidance_scale=float(guidance if guidance is not None else defaults["guidance_scale"].default),
        height=height,
        width=width,
        batch=arguments.batch,
        seed=arguments.seed,
        text_arguments=family_named(manifest.family, manifest.transformer_config).pipeline_arguments(
            pipe, manifest.geometry.text_length
        ),
    )


def _scheduler(name: str, before: Any) -> Any:
    """The scheduler of this class, with the config of the one before.

    Raises:
        SettingsError: diffusers has none of this name, it cannot be made so, or is not stepped as a pipeline steps one.
    """
    import diffusers

    found: Any = getattr(diffusers, name, None)
    is_one = inspect.isclass(found) and issubclass(found, diffusers.SchedulerMixin) and hasattr(found, "step")
    if not is_one:
        raise SettingsError(f"--scheduler {name}: diffusers has no such scheduler")
    needed = [each.name for each in inspect.signature(found.step).parameters.values() if each.default is each.empty]
    if strange := [each for each in needed if each not in ("self", "model_output", "timestep", "sample", "kwargs")]:
        raise SettingsError(f"--scheduler {name}: its steps need {', '.join(strange)}, which no such pipeline has")
    try:
        return found.from_config(before.config)
    except (TypeError, ValueError, NotImplementedError) as error:  # arguments that it has no defaults of
        raise SettingsError(f"--scheduler {name}: it cannot be made from the pipeline's ({error})") from error


def _with_measures(
    schedules: Sequence[Schedule], expected: dict[int, float], outcomes: Sequence[Outcome], job: Job
) -> list[Schedule]:
    from math import isfinite

    from cat_pruning.evaluation.candidates import TUNED
    from cat_pruning.schedule import Measured

    by_budget = {each.contender.budget: each for each in outcomes if each.contender.method == TUNED}
    measured = []
    for schedule in schedules:
        budget = len(schedule.full_steps)
        error = by_budget[budget].error
        found = Measured(
            speedup=job.full_macs / by_budget[budget].contender.macs,
            predicted_error=expected[budget],
            error=error.mean,
            half_width=error.half_width if isfinite(error.half_width) else None,
            prompts=error.prompts,
        )
        measured.append(schedule.model_copy(update={"measured": found}))
    return measured


@contextmanager
def _progress(screen: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage; yields what is called with the stage, its total and how much more of it is done."""
    with progress(screen) as bar:
        tasks: dict[str, Any] = {}

        def advance(stage: str, total: int, count: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            task = next(task for task in bar.tasks if task.id == tasks[stage])
            bar.update(task.id, completed=min(total, task.completed + count))

        yield advance


if __name__ == "__main__":
    sys.exit(main())
