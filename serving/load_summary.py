"""What a load's answers say: throughput, latencies and refusals, of each rate; as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cat_pruning.errors import OutputError
from cat_pruning.files import write_whole
from cat_pruning.serving.load import Answer, LoadConfig, Outcome, by_outcome

PERCENTILES = (50, 95, 99)
_COLOURS = ("#009e73", "#e66f00", "#0072b2")  # Okabe and Ito's, which colour-blind people tell apart


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSummary:
    """What one rate's answers say.

    offered_per_s: the rate; of a few requests the arrivals' own rate, offered_truly_per_s, differs by chance.
    seconds: from the beginning to the last answer. images_per_s: images over these seconds. latency_s: of completed
    requests, from when they were due: mean, p50, p95, p99, max; empty where there are none. server_ms: the same of the
    times that the server tells. failures, rejections: by what was said. sent_late_s: how far the client itself was
    behind at most; where that is not small beside the latencies, the client was the limit.
    """

    offered_per_s: float
    offered_truly_per_s: float
    requests: int
    completed: int
    images: int
    rejected: int
    failed: int
    seconds: float
    images_per_s: float
    latency_s: dict[str, float]
    server_ms: dict[str, dict[str, float]]
    rejections: dict[str, int]
    failures: dict[str, int]
    sent_late_s: float


def summarise(rate: float, answers: Sequence[Answer]) -> RateSummary:
    """Summarise the answers of one rate, at least one."""
    done = by_outcome(answers, Outcome.COMPLETED)
    seconds = max(answer.due_s + answer.latency_s for answer in answers)
    images = sum(answer.images for answer in done)
    names = sorted({name for answer in done for name in answer.timings})
    return RateSummary(
        offered_per_s=rate,
        offered_truly_per_s=len(answers) / max(answer.due_s for answer in answers),
        requests=len(answers),
        completed=len(done),
        images=images,
        rejected=len(by_outcome(answers, Outcome.REJECTED)),
        failed=len(by_outcome(answers, Outcome.FAILED)),
        seconds=seconds,
        images_per_s=images / seconds,
        latency_s=_spread([answer.latency_s for answer in done]),
        server_ms={name: _spread([a.timings[name] for a in done if name in a.timings]) for name in names},
        rejections=_counted(answers, Outcome.REJECTED),
        failures=_counted(answers, Outcome.FAILED),
        sent_late_s=max(answer.late_s for answer in answers),
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    percentiles = {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}
    return {"mean": float(np.mean(values)), **percentiles, "max": float(np.max(values))}


def _counted(answers: Sequence[Answer], outcome: Outcome) -> dict[str, int]:
    return dict(Counter(answer.said for answer in by_outcome(answers, outcome)).most_common())


def write_json(config: LoadConfig, measured: Sequence[tuple[RateSummary, Sequence[Answer]]], path: Path) -> None:
    """Write the load and, of each rate, its summary and every request: when it was due, its latency, its outcome.

    Raises:
        OutputError: the file cannot be written.
    """
    rates = []
    for summary, answers in measured:
        each = [[round(a.due_s, 4), round(a.latency_s, 4), a.outcome.value] for a in answers]
        rates.append(dataclasses.asdict(summary) | {"each": each})
    content: dict[str, Any] = {"load": dataclasses.asdict(config), "rates": rates}
    _write("--json", path, lambda: (json.dumps(content, indent=1) + "\n").encode())


def draw(summaries: Sequence[RateSummary], path: Path) -> None:
    """Draw throughput and latencies against the offered rate, in the format of the path's ending.

    Raises:
        OutputError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "load", "font.family": "sans-serif"}):
        figure = Figure(figsize=(11.4, 3.4), layout="constrained")
        panels = figure.subplots(1, 3)
        for panel, drawn in zip(panels, (_draw_throughput, _draw_outcomes, _draw_latencies), strict=True):
            drawn(panel, summaries)
            panel.set(xlabel="offered, requests per second", xlim=(0, None))
            panel.grid(alpha=0.25)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix.removeprefix(".").lower(), dpi=150)
    _write("--picture", path, buffer.getvalue)


def _draw_throughput(axes: Any, summaries: Sequence[RateSummary]) -> None:
    axes.plot([s.offered_per_s for s in summaries], [s.images_per_s for s in summaries], "o-", color=_COLOURS[0])
    axes.set(title="images per second", ylim=(0, None))


def _draw_outcomes(axes: Any, summaries: Sequence[RateSummary]) -> None:
    rates = [summary.offered_per_s for summary in summaries]
    for name, colour in zip(("completed", "rejected", "failed"), _COLOURS, strict=True):
        shares = [100 * getattr(summary, name) / summary.requests for summary in summaries]
        axes.plot(rates, shares, "o-", color=colour, label=name)
    axes.set(title="% of requests", ylim=(-3, 103))
    axes.legend(frameon=False, fontsize="small", loc="center left")


def _draw_latencies(axes: Any, summaries: Sequence[RateSummary]) -> None:
    answered = [summary for summary in summaries if summary.latency_s]
    rates = [summary.offered_per_s for summary in answered]
    for percent, colour in zip(PERCENTILES, _COLOURS, strict=True):
        values = [summary.latency_s[f"p{percent}"] for summary in answered]
        axes.plot(rates, values, "o-", color=colour, label=f"p{percent}")
    axes.set(title="latency of completed requests, seconds", ylim=(0, None))
    axes.legend(frameon=False, fontsize="small", loc="upper left")


def _write(option: str, path: Path, content: Callable[[], bytes]) -> None:
    try:
        write_whole(path, content())
    except OSError as error:
        raise OutputError(f"{option} {path} cannot be written ({error.strerror})", "give another path") from error
