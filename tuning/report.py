"""What tuning found: as a table, as JSON, and as a picture of quality against cost."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

from cat_pruning.errors import OutputError
from cat_pruning.evaluation.candidates import TUNED
from cat_pruning.evaluation.intervals import Interval
from cat_pruning.files import replacing, write_whole
from cat_pruning.tuning.measure import Outcome

_MARKERS = ("s", "^", "v", "D", "P", "X")
_COLOURS = ("#6b7280", "#b45309", "#9333ea", "#0891b2", "#dc2626", "#65a30d")


def table(outcomes: Sequence[Outcome], full: Outcome) -> Table:
    """The table for a terminal: a block for each budget, the tuned schedule first.

    Args:
        outcomes: of all contenders, those of a budget together.
        full: the full run's.
    """
    title = f"against {full.contender.steps} full steps, on prompts that were not fitted to"
    made = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("full", "method", "MACs", "latents' error", "PSNR", "score", "s"):
        made.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    budget = None
    for outcome in outcomes:
        contender = outcome.contender
        is_new, budget = contender.budget != budget, contender.budget
        if is_new and made.rows:
            made.add_section()
        made.add_row(
            str(budget) if is_new else "",
            contender.method,
            f"1/{full.contender.macs / contender.macs:.2f}",
            _text(outcome.error, 4),
            f"{outcome.psnr_db.mean:.1f}" if outcome.psnr_db else "–",
            _text(outcome.score_change, 3, "+"),
            f"{outcome.seconds:.2f}",
            style="bold" if contender.method == TUNED else None,
        )
    return made


def to_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The numbers of every contender, as JSON types; a mean of one prompt has no interval."""
    return [
        {
            "method": outcome.contender.method,
            "budget": outcome.contender.budget,
            "steps": outcome.contender.steps,
            "macs": outcome.contender.macs,
            "latents_error": _numbers(outcome.error),
            "psnr_db": _numbers(outcome.psnr_db),
            "score_change": _numbers(outcome.score_change),
            "seconds": outcome.seconds,
        }
        for outcome in outcomes
    ]


def draw(outcomes: Sequence[Outcome], full_macs: int, path: Path) -> None:
    """Draw the error against the cost, a line a method, with 95 % intervals, as one PNG.

    Raises:
        OutputError: it cannot be written.
    """
    figure = Figure(figsize=(7.5, 5.0), dpi=140, layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(outcome.contender.method for outcome in outcomes))
    others = [method for method in methods if method != TUNED]
    for method in [*others, *([TUNED] if TUNED in methods else [])]:
        points = sorted(
            (outcome for outcome in outcomes if outcome.contender.method == method),
            key=lambda outcome: outcome.contender.macs,
        )
        cost = [100 * point.contender.macs / full_macs for point in points]
        mean = [point.error.mean for point in points]
        half = [point.error.half_width if math.isfinite(point.error.half_width) else 0.0 for point in points]
        if method == TUNED:
            style: dict[str, Any] = {"color": "#1d4ed8", "marker": "o", "linewidth": 2.4, "zorder": 5}
        else:
            index = others.index(method)
            style = {
                "color": _COLOURS[index % len(_COLOURS)],
                "marker": _MARKERS[index % len(_MARKERS)],
                "linewidth": 1.2,
            }
        axes.errorbar(cost, mean, yerr=half, label=method, capsize=3, markersize=6, **style)
    axes.set_yscale("log")
    axes.set_xlabel("MACs of an image, % of the full run's")
    axes.set_ylabel("relative error of the final latents")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title("How far from the full run's image, at what cost", loc="left")
    try:
        with replacing(path) as part:
            figure.savefig(part, format="png")
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error})", "make room") from error


def write_json(fields: dict[str, Any], path: Path) -> None:
    """Write the numbers.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        write_whole(path, json.dumps(fields, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error})", "make room") from error


def _text(interval: Interval | None, digits: int, sign: str = "") -> str:
    if interval is None:
        return "–"
    half = f" ± {interval.half_width:.{digits}f}" if math.isfinite(interval.half_width) else ""
    return f"{interval.mean:{sign}.{digits}f}{half}"


def _numbers(interval: Interval | None) -> dict[str, float | int | None] | None:
    if interval is None:
        return None
    half = interval.half_width if math.isfinite(interval.half_width) else None
    return {"mean": interval.mean, "half_width": half, "prompts": interval.prompts}
