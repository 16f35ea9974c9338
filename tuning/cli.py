"""`cat-tune`: schedules fitted to a bundle's model, measured, and put into the bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from cat_pruning import console
from cat_pruning.arguments import check_outputs
from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.arguments import cluster_of
from cat_pruning.installation import require
from cat_pruning.terminal import progress, say, terminal, waiting
from cat_pruning.tuning.arguments import budgets_of, check, parse

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.evaluation.pool import Pool
    from cat_pruning.models.prompts import Prompt
    from cat_pruning.schedule import Schedule
    from cat_pruning.tuning.job import Job
    from cat_pruning.tuning.measure import Outcome
    from cat_pruning.tuning.worker import Tuner


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
    from cat_pruning.evaluation.pool import pool_of
    from cat_pruning.models.prompts import load_prompts, tuning_prompts
    from cat_pruning.tuning.recorder import NUMBERS, PICTURE, existing_run, forget
    from cat_pruning.tuning.report import draw, table, to_json, write_json
    from cat_pruning.tuning.worker import Recipe

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
    _check_size(arguments, bundle)
    recipe = Recipe(bundle=bundle.path.absolute(), engine=arguments.engine, scheduler=arguments.scheduler)
    with ExitStack() as stack:
        with waiting(screen, "Load the bundle …") as status:
            pool = stack.enter_context(
                pool_of(recipe, cluster_of(arguments), status.update, lambda line: say(line, to=screen))
            )
            console.quiet_libraries()  # diffusers sets its own level when it is imported
        pool.about.check(bundle)
        job = _job(arguments, bundle, pool, directory)
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


def _job(arguments: argparse.Namespace, bundle: Bundle, pool: Pool[Tuner], directory: Path) -> Job:
    from cat_pruning.tuning.job import Job

    about, guidance = pool.about, arguments.guidance_scale
    height, width = _size(arguments, bundle)
    return Job(
        bundle=bundle,
        pool=pool,
        directory=directory,
        steps=arguments.steps or about.steps,
        guidance_scale=float(guidance if guidance is not None else about.guidance_scale),
        height=height,
        width=width,
        batch=arguments.batch,
        seed=arguments.seed,
    )


def _size(arguments: argparse.Namespace, bundle: Bundle) -> tuple[int, int]:
    first = bundle.manifest.profiles[0]
    return arguments.resolution or (first.height, first.width)


def _check_size(arguments: argparse.Namespace, bundle: Bundle) -> None:
    """Tell a size that the model cannot take in pixels, before the text encoders run."""
    from cat_pruning.bundle.profiles import profile_spec
    from cat_pruning.settings import PruneSettings

    manifest = bundle.manifest
    height, width = _size(arguments, bundle)
    profile_spec(height, width, 1, geometry=manifest.geometry, settings=PruneSettings(), guidance=manifest.guidance)


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
