"""The tables of a report, in the layout of the paper's tables 2 and 3: one for each schedule, a row a candidate."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from cat_pruning.console import macs
from cat_pruning.evaluation.candidates import FULL, Candidate
from cat_pruning.evaluation.intervals import Interval
from cat_pruning.evaluation.measures import Measure, measure_of
from cat_pruning.evaluation.outcome import Outcome
from cat_pruning.evaluation.paired import paired_scores, score_interval
from cat_pruning.evaluation.wording import limits, signed

_NOTHING = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A number of a table, what one needs to know of it, and whether it is better or worse than another."""

    text: str
    note: str = ""
    verdict: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A table's rows of one keep ratio, each a method's name and its cells; the full runs' has no title."""

    title: str
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def columns(found: Outcome) -> list[str]:
    """The titles of every table's columns."""
    titles = [measure_of(metric).title for metric in found.metrics]
    of_prompt = [f"{measure_of(metric).title}, change from full (%)" for metric in found.prompt_metrics]
    to_fewer = [f"{measure_of(metric).title}, change from fewer steps" for metric in found.headline]
    costs = ["MACs", "Throughput (images/s)", "Speed (×)", *(["CPU (s/image)"] if found.has_cpu_seconds else [])]
    return ["Method", *costs, *titles, *of_prompt, *to_fewer, "Images"]


def groups(found: Outcome, steps: int) -> list[Group]:
    """The rows of one schedule's table: the full runs, then each keep ratio."""
    full = tuple((candidate.name, _cells(found, candidate)) for candidate in found.full_runs(steps))
    rows_by_ratio = [Group(title="", rows=full)] if full else []
    for ratio in found.ratios(steps):
        rows = tuple((candidate.name, _cells(found, candidate)) for candidate in found.at(steps, ratio))
        rows_by_ratio.append(Group(title=f"keep {ratio:g}", rows=rows))
    return rows_by_ratio


def _cells(found: Outcome, candidate: Candidate) -> tuple[Cell, ...]:
    results, full, fewer = found.of(candidate), found.find(FULL, candidate.steps), found.fewer_steps(candidate)
    scores = [_score(score_interval(results, metric), measure_of(metric)) for metric in found.metrics]
    to_full = [_change(found, candidate, full, metric, percent=True) for metric in found.prompt_metrics]
    to_fewer = [_change(found, candidate, fewer, metric, percent=False) for metric in found.headline]
    return (*_costs(found, candidate, full), *scores, *to_full, *to_fewer, Cell(text=str(len(results))))


def _costs(found: Outcome, candidate: Candidate, full: Candidate | None) -> tuple[Cell, ...]:
    """MACs, throughput, speed and processors' time; engines are not compared with one another."""
    share = f"{100 * candidate.macs_all / full.macs_all:.0f} % of full" if full and candidate != full else ""
    seconds = median(result.seconds for result in found.of(candidate))
    other = bool(full and full.engine != candidate.engine)
    speed = Cell(text=_NOTHING)
    if full and not other:
        speed = Cell(text=f"{median(result.seconds for result in found.of(full)) / seconds:.2f}")
    throughput = Cell(text=f"{1 / seconds:#.3g}".rstrip("."), note=f"on {candidate.engine}" if other else "")
    cpu = found.cpu_seconds(candidate)
    processors = (Cell(text=_NOTHING if cpu is None else f"{cpu:.3g}"),) if found.has_cpu_seconds else ()
    return Cell(text=macs(candidate.macs_all), note=share), throughput, speed, *processors


def _score(interval: Interval | None, measure: Measure) -> Cell:
    if interval is None:
        return Cell(text=_NOTHING)
    spread = f" ± {interval.half_width:.{measure.digits}f}" if interval.prompts > 1 else ""
    left_out = f"{interval.left_out} left out" if interval.left_out else ""
    return Cell(text=f"{interval.mean:.{measure.digits}f}{spread}", note=left_out)


def _change(found: Outcome, candidate: Candidate, other: Candidate | None, metric: str, *, percent: bool) -> Cell:
    if other is None or other == candidate:
        return Cell(text=_NOTHING)
    paired, measure = paired_scores(found.of(candidate), found.of(other), metric), measure_of(metric)
    if paired is None or (interval := paired.percent if percent else paired.difference) is None:
        return Cell(text=_NOTHING)
    digits = 1 if percent else measure.digits
    judged = measure.verdict(paired.difference)
    return Cell(text=signed(interval.mean, digits), note=limits(interval, digits, word=""), verdict=judged)
