"""Plans and schedules dropped from a bundle, in its place."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cat_pruning.bundle.changes import Change, change_bundle
from cat_pruning.bundle.manifest import Manifest
from cat_pruning.bundle.plan_sets import PlanSet, plan_sets
from cat_pruning.bundle.schedules import schedule_name
from cat_pruning.errors import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """What a bundle no longer has: names of sets of plans and of schedules, and the bytes of their files."""

    plans: tuple[str, ...]
    schedules: tuple[str, ...]
    num_bytes: int


def prune_bundle(directory: Path, plans: Collection[str] = (), schedules: Collection[str] = ()) -> Dropped:
    """Drop plans and schedules, all that were asked for or none, and what a killed change left; see `change_bundle`.

    Args:
        directory: the bundle's.
        plans: names of sets, as tensorrt-11.4.0-sm90, patterns of them, as tensorrt-10.*, or names of flavours.
        schedules: names, as 28-9, or patterns of them.

    Raises:
        BundleError: there is no bundle.
        OutputError: it cannot be written; it is as it was.
        SettingsError: there is nothing of such a name.
    """
    dropped: list[Dropped] = []

    def drop(manifest: Manifest) -> Change:
        sets = plan_sets(manifest.plans)
        gone_sets = [sets[index] for index in _chosen("plans", [_names(each) for each in sets], plans)]
        names = [schedule_name(name) for name in manifest.schedules]
        gone_schedules = [
            manifest.schedules[index] for index in _chosen("schedules", [[each] for each in names], schedules)
        ]
        files = {*(plan.file for each in gone_sets for plan in each.plans), *gone_schedules}
        dropped.append(
            Dropped(
                plans=tuple(each.name for each in gone_sets),
                schedules=tuple(map(schedule_name, gone_schedules)),
                num_bytes=sum(manifest.files[name].size for name in files),
            )
        )
        kept = {
            "plans": tuple(plan for plan in manifest.plans if plan.file not in files),
            "schedules": tuple(name for name in manifest.schedules if name not in files),
        }
        return Change(fields=kept, dropped=files)

    change_bundle(directory, drop)
    return dropped[0]


def _names(plans: PlanSet) -> list[str]:
    return [plans.name, plans.flavour]


def _chosen(kind: str, names: list[list[str]], patterns: Collection[str]) -> list[int]:
    """Which things one of the patterns matches by one of their names."""
    found = {
        pattern: {index for index, each in enumerate(names) if any(fnmatch.fnmatchcase(name, pattern) for name in each)}
        for pattern in patterns
    }
    if missing := [pattern for pattern, indices in found.items() if not indices]:
        there = ", ".join(each[0] for each in names) or "none"
        raise SettingsError(f"the bundle has no {kind} {', '.join(map(repr, missing))}; it has {there}")
    return sorted(set().union(*found.values()))
