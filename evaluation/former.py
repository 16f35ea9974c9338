"""Names of earlier versions, in files and on the command line, and what they are called today.

A candidate was called a variant, the coverage a scene score, and the methods policies. Full steps after the first ones
were `extra_full_steps` of the settings, and are rows of a schedule. The numbers are the same.
"""

from __future__ import annotations

from typing import Any

from cat_pruning.schedule import Schedule

FORMER_SCORES = {"scene_score": "coverage"}
FORMER_METRICS = {"scene": "coverage"}  # of --metrics


def current_spec(fields: dict[str, Any], current_format: int) -> dict[str, Any]:
    """The fields of a run.json of formats 1 and 2 as today's; those of other formats as they are."""
    if fields.get("format") not in (1, 2):
        return fields
    renamed = {("candidates" if name == "variants" else name): value for name, value in fields.items()}
    renamed["metrics"] = [FORMER_SCORES.get(name, name) for name in fields["metrics"]]
    renamed["settings"] = current_settings(fields["settings"])
    renamed["candidates"] = [
        {**candidate, "settings": current_settings(candidate["settings"], candidate["sampled_steps"])}
        for candidate in renamed["candidates"]
    ]
    return {**renamed, "format": current_format}


def current_settings(fields: dict[str, Any], steps: int = 0) -> dict[str, Any]:
    """The settings with a schedule in the place of `extra_full_steps`, which RAS alone had."""
    if "extra_full_steps" not in fields:
        return fields
    extra = fields["extra_full_steps"]
    kept = {name: value for name, value in fields.items() if name != "extra_full_steps"}
    full = {*range(min(steps, fields["full_steps"])), *extra}
    schedule = Schedule.of(steps, full, pruned=set(range(steps)) - full).model_dump(mode="json") if extra else None
    return {**kept, "schedule": schedule}


def current_result(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a line of results.jsonl as today's."""
    renamed = {("candidate" if name == "variant" else name): value for name, value in fields.items()}
    if isinstance(scores := renamed.get("scores"), dict):
        renamed["scores"] = {FORMER_SCORES.get(name, name): value for name, value in scores.items()}
    return renamed
