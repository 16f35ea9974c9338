"""The schedules in a bundle: read, chosen by their speed, and put there by `cat-tune`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.changes import Change, change_bundle
from cat_pruning.bundle.manifest import Manifest
from cat_pruning.errors import BundleError, OutputError, ScheduleError
from cat_pruning.schedule import Schedule

FOLDER: Final = "schedules"
_SLACK: Final = 0.97  # of a speedup that is asked for: 3 is 28 steps of which 9 are full, 3.1, or 10 of 29


def read_schedules(bundle: Bundle) -> dict[str, Schedule]:
    """The schedules of a bundle by their names, the slowest first.

    Raises:
        BundleError: a file of one is missing or was edited.
        ScheduleError: one is of another version, or was made for another model.
    """
    manifest = bundle.manifest
    try:
        schedules = [Schedule.load(bundle.verified(name)) for name in manifest.schedules]
    except (BundleError, ScheduleError):  # the second of one that went after its hash was checked
        now = Bundle.open(bundle.path, bundle.public_key)
        if now.manifest == manifest:
            raise
        return read_schedules(now)  # others took their place since the bundle was opened
    for schedule in schedules:
        schedule.check_model(manifest.transformer_class, manifest.transformer_config)
    return {each.name: each for each in sorted(schedules, key=lambda each: (each.num_steps, -len(each.full_steps)))}


def choose_schedule(schedules: Mapping[str, Schedule], speedup: float, num_steps: int, *, tune: str) -> Schedule:
    """The slowest schedule of `num_steps` steps that is `speedup` times as fast as the full run, to 3 %.

    Args:
        schedules: to choose from.
        speedup: by MACs.
        num_steps: of the run.
        tune: the command that makes more of them, up to its options.

    Raises:
        ScheduleError: there is none; what there is.
    """
    as_long = [each for each in schedules.values() if each.num_steps == num_steps]
    if fitting := [each for each in as_long if speed_of(each) >= _SLACK * speedup]:
        return min(fitting, key=speed_of)
    there = ", ".join(f"{each.num_steps} steps at {speed_of(each):.3g}" for each in schedules.values())
    raise ScheduleError(
        f"there is no schedule of {num_steps} steps that is {speedup:g} times as fast"
        + (f"; there are {there}" if there else ", nor any other"),
        f"make one: {tune} --steps {num_steps} --speedup {speedup:g}",
    )


def speed_of(schedule: Schedule) -> float:
    """How many times as fast as the full run a schedule is, by MACs where they were counted, else by its full steps."""
    return schedule.measured.speedup if schedule.measured else schedule.num_steps / len(schedule.full_steps)


def write_schedules(directory: Path, schedules: Iterable[Schedule], *, digest: str | None = None) -> Bundle:
    """Put schedules into a bundle, in the place of those of the same names. Waits for another process that does.

    A file's name has its content's hash, so what the manifest lists is never overwritten; see `change_bundle`. Files
    that it never listed stay.

    Args:
        directory: the bundle's.
        schedules: to put there.
        digest: of the manifest that they were made with (`Manifest.digest`); None: not asked.

    Raises:
        BundleError: there is no bundle.
        OutputError: it cannot be written, or is not the one that they were made with.
    """
    new = {each.name: each.to_json().encode() for each in schedules}
    added = {
        f"{FOLDER}/{name}.{hashlib.sha256(content).hexdigest()[:12]}.json": content for name, content in new.items()
    }

    def put(manifest: Manifest) -> Change:
        if digest not in (None, manifest.digest):
            raise OutputError(
                f"{directory} was replaced by another export meanwhile, which these schedules were not made for",
                "tune it again",
            )
        kept = [name for name in manifest.schedules if schedule_name(name) not in new]
        dropped = set(manifest.schedules) - set(kept)
        return Change(fields={"schedules": (*kept, *added)}, added=added, dropped=dropped)

    return change_bundle(directory, put)


def schedule_name(file: str) -> str:
    """The name of the schedule that a file of the bundle holds: 28-9 of schedules/28-9.0123456789ab.json."""
    return Path(file).name.split(".")[0]
