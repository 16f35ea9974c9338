"""Names of earlier versions, in files and on the command line, and what they are called today.

A candidate was called a variant, the coverage a scene score, and the methods policies. The numbers are the same.
"""

from __future__ import annotations

from typing import Any

FORMER_SCORES = {"scene_score": "coverage"}
FORMER_METRICS = {"scene": "coverage"}  # of --metrics


def current_spec(fields: dict[str, Any], current_format: int) -> dict[str, Any]:
    """The fields of a run.json of format 1 as today's; those of other formats as they are."""
    if fields.get("format") != 1:
        return fields
    renamed = {("candidates" if name == "variants" else name): value for name, value in fields.items()}
    renamed["metrics"] = [FORMER_SCORES.get(name, name) for name in fields["metrics"]]
    return {**renamed, "format": current_format}


def current_result(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a line of results.jsonl as today's."""
    renamed = {("candidate" if name == "variant" else name): value for name, value in fields.items()}
    if isinstance(scores := renamed.get("scores"), dict):
        renamed["scores"] = {FORMER_SCORES.get(name, name): value for name, value in scores.items()}
    return renamed
