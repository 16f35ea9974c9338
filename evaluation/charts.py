"""Pictures inside an HTML page that loads nothing: quality against cost as SVG, images as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from cat_pruning.evaluation.candidates import FEWER_STEPS, FULL, Candidate
from cat_pruning.evaluation.intervals import Interval
from cat_pruning.evaluation.measures import measure_of
from cat_pruning.evaluation.methods import REFRESHED, policy_of
from cat_pruning.evaluation.paired import paired_difference, score_interval
from cat_pruning.evaluation.results import ImageResult

# Okabe and Ito's colours, which colour-blind people tell apart. CAT is orange, fewer steps are black.
_COLOURS = {"cat": "#e66f00", FEWER_STEPS: "#000000", FULL: "#777777"}
_OTHER_COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#b8a000", "#7a3fa0", "#8c5a2b")
_MARKERS = ("s", "^", "v", "D", "P", "X", "<")
_DODGE = 0.011  # how far apart methods of equal cost are drawn, as a share of the axis
_PANEL_INCHES = (4.6, 3.5)
_LEGEND_INCHES = 1.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image as a data URI, empty where there is none; `width` is what it is shown at, in pixels."""

    uri: str = ""
    caption: str = ""
    width: int = 0
    enlarged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    colour: str
    marker: str
    line: str
    width: float
    order: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    percent: float
    interval: Interval


def quality_curves(
    candidates: Sequence[Candidate],
    results: Mapping[str, Sequence[ImageResult]],
    metric: str,
    *,
    less_full: bool = False,
) -> str | None:
    """One metric against the cost of an image, one panel for each schedule, a line for each method over its ratios.

    The points of a panel are means over the prompts that all of its candidates have, so that they can be compared.
    Error bars are 95 % intervals; methods that cost the same stand side by side. The full run is a band.

    Args:
        candidates: all that was compared. Costs are relative to the full run of the same schedule.
        results: of each candidate, by `Candidate.key`; candidates without results are left out.
        metric: its name in `ImageResult.scores`.
        less_full: draw the paired differences from the full run instead of means. Means differ more by prompt than
            by method, paired differences do not.

    Returns:
        An `<svg>` element whose ids begin with the metric's name; None if there is nothing to draw.
    """
    methods = tuple(dict.fromkeys(candidate.method for candidate in candidates))
    drawn_steps = dict.fromkeys(candidate.steps for candidate in candidates)
    every = {steps: _points(candidates, results, metric, steps, less_full) for steps in drawn_steps}
    panels = {steps: points for steps, points in every.items() if set(points) - {FULL}}
    if not panels:
        return None
    title, name = measure_of(metric).title, metric
    if less_full:
        title, name = f"{title}, less full's", f"{metric}-less-full"
    # Legends and labels are text in the reader's own font. The same data give the same ids.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        return _inline(_draw_figure(panels, methods, title), name)


def _common_prompts(results: Sequence[Sequence[ImageResult]]) -> set[int]:
    """The prompts that every one of several candidates has results of."""
    return set.intersection(*({result.prompt for result in some} for some in results)) if results else set()


def inline_picture(file: Path, caption: str, most: int | None = None) -> Picture:
    """An image file for a page, as it is, or reduced where its longer side has more than `most` pixels.

    Args:
        file: a PNG; if it is missing, or an interruption cut it off, the picture is empty.
        caption: of the picture.
        most: pixels; None takes any.
    """
    try:
        with Image.open(file) as image:
            image.load()
            content, kind, longest = file.read_bytes(), "png", max(image.size)
            if most is not None and longest > most:
                image.thumbnail((most, most), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, format="JPEG", quality=92)
                content, kind = buffer.getvalue(), "jpeg"
    except OSError:
        return Picture(caption=caption)
    width = 256 if longest >= 256 else -(-192 // longest) * image.width  # enlarged by a whole factor
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return Picture(uri=uri, caption=caption, width=width, enlarged=longest < 256)


def _points(
    candidates: Sequence[Candidate],
    results: Mapping[str, Sequence[ImageResult]],
    metric: str,
    steps: int,
    less_full: bool,
) -> dict[str, list[_Point]]:
    """A panel's points by method, from the cheapest."""
    present = [candidate for candidate in candidates if candidate.steps == steps and results.get(candidate.key)]
    full = next((candidate for candidate in candidates if candidate.steps == steps and candidate.method == FULL), None)
    if full is None:
        return {}
    prompts = _common_prompts([results[candidate.key] for candidate in present])
    points: dict[str, list[_Point]] = {}
    for candidate in sorted(present, key=lambda candidate: candidate.macs_all):
        shared = [result for result in results[candidate.key] if result.prompt in prompts]
        interval = (
            paired_difference(shared, results.get(full.key, ()), metric)
            if less_full
            else score_interval(shared, metric)
        )
        if interval is not None:
            percent = 100 * candidate.macs_all / full.macs_all
            points.setdefault(candidate.method, []).append(_Point(percent=percent, interval=interval))
    return points


def _draw_figure(panels: Mapping[int, Mapping[str, Sequence[_Point]]], methods: Sequence[str], title: str) -> Figure:
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(panels) + _LEGEND_INCHES, height), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    lines: dict[str, Any] = {}
    for panel, (steps, points) in zip(axes.flat, panels.items(), strict=True):
        _draw_panel(panel, points, methods)
        panel.set_title(f"{steps} steps", fontsize=11)
        handles, labels = panel.get_legend_handles_labels()
        lines.update(zip(labels, handles, strict=True))
    axes.flat[0].set_ylabel(title)
    order = sorted(lines, key=methods.index)
    figure.legend([lines[label] for label in order], order, loc="outside right center", frameon=False, handlelength=3.2)
    return figure


def _draw_panel(panel: Axes, points: Mapping[str, Sequence[_Point]], methods: Sequence[str]) -> None:
    costs = [point.percent for method, some in points.items() if method != FULL for point in some]
    left, right = min(costs), max(costs)
    room = max(right - left, 5.0)
    compared = [method for method in methods if method in points and method != FULL]
    for number, method in enumerate(compared):
        shift = (number - (len(compared) - 1) / 2) * _DODGE * room
        _draw_method(panel, method, points[method], _style_of(method, methods), shift)
    for point in points.get(FULL, ()):
        grey = _COLOURS[FULL]
        panel.axhline(point.interval.mean, color=grey, linewidth=1.3, label=FULL, zorder=1)
        if point.interval.prompts > 1:
            panel.axhspan(point.interval.low, point.interval.high, color=grey, alpha=0.15, linewidth=0, zorder=0)
    panel.set_xlim(left - 0.12 * room, right + 0.12 * room)
    panel.set_xlabel("MACs of an image, % of the full run's")
    panel.grid(color="#e4e4e4", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=9, color="#888888")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _draw_method(panel: Axes, method: str, points: Sequence[_Point], style: _Style, shift: float) -> None:
    bars = [point.interval.half_width if point.interval.prompts > 1 else 0.0 for point in points]
    panel.errorbar(
        [point.percent + shift for point in points],
        [point.interval.mean for point in points],
        yerr=bars,
        label=method,
        color=style.colour,
        marker=style.marker,
        markerfacecolor=style.colour,
        markersize=5,
        linestyle=style.line,
        linewidth=style.width,
        elinewidth=1.0,
        capsize=2,
        zorder=style.order,
    )


def _style_of(method: str, methods: Sequence[str]) -> _Style:
    """How every panel draws a method: dash-dotted if it refreshes."""
    policy = policy_of(method)
    if policy in _COLOURS:
        line = "--" if policy == FEWER_STEPS else "-"
        colour, marker, width, order = _COLOURS[policy], "o", 2.2, 5
    else:
        others = list(dict.fromkeys(policy_of(name) for name in methods))
        number = [name for name in others if name not in _COLOURS].index(policy)
        colour, marker = _OTHER_COLOURS[number % len(_OTHER_COLOURS)], _MARKERS[number % len(_MARKERS)]
        line, width, order = "-", 1.3, 3
    if REFRESHED in method:
        line = "-."
    return _Style(colour=colour, marker=marker, line=line, width=width, order=order)


def _inline(figure: Figure, name: str) -> str:
    """The figure as an element, without prolog and metadata; every id begins with `name`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode("utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
