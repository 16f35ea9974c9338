"""An evaluation as one HTML page that loads nothing: tables in the layout of the paper's 2 and 3, curves, images."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cat_pruning.console import macs
from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.evaluation.charts import Picture, inline_picture, quality_curves
from cat_pruning.evaluation.methods import FORECAST, policy_of
from cat_pruning.evaluation.results import IMAGES, REPORT, TOKENS, RunSpec
from cat_pruning.evaluation.statistics import (
    MAIN_METHOD,
    Evaluation,
    Interval,
    Measure,
    compare,
    measure_of,
    score_interval,
    verdict,
)
from cat_pruning.evaluation.variants import FEWER_STEPS, FULL, Variant

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_MAIN_RATIO = 0.3
_SHEET_PIXELS = 512  # larger images are reduced to this: a page of full ones would be hundreds of megabytes
_NOTHING = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A number of a table, what one needs to know of it, and whether it is better or worse than another."""

    text: str
    note: str = ""
    verdict: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A table's rows of one keep ratio, each a method's name and its cells; the full run's has no title."""

    title: str
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def check_installed() -> None:
    """Check that what a report needs is there, before a long run.

    Raises:
        SettingsError: jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise SettingsError("the report needs jinja2", "pip install 'cat-pruning[eval]'") from error


def write_report(directory: Path) -> Path:
    """Write the report of an evaluation, finished or not, into its directory.

    Args:
        directory: that a `ResultStore` wrote.

    Returns:
        The page; an existing one is replaced at once, never half.

    Raises:
        SettingsError: no evaluation, no results yet, or jinja2 is not installed.
        OutputError: the page cannot be written.
    """
    check_installed()
    import jinja2

    found = Evaluation(directory)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    done, wanted = found.scored()
    kinds = [(metric, False) for metric in found.metrics] + [(metric, True) for metric in found.prompt_metrics]
    curves = [
        quality_curves(found.spec.variants, found.results, metric, less_full=less_full) for metric, less_full in kinds
    ]
    page = template.render(
        spec=found.spec,
        facts=_facts(found.spec),
        done=done,
        wanted=wanted,
        missing=[variant.key for variant in found.spec.variants if variant.key not in found.results],
        summary=_summary(found),
        columns=_columns(found),
        tables=[(steps, _groups(found, steps)) for steps in found.steps],
        curves=[curve for curve in curves if curve],
        sheets=[_sheet(found, steps) for steps in found.steps],
        token_maps=_token_maps(found),
    )
    return _write(directory / REPORT, page)


def _facts(spec: RunSpec) -> list[tuple[str, str]]:
    settings = ", ".join(f"{name} {value}" for name, value in spec.settings.items() if name != "keep_ratio")
    return [
        ("Bundle", f"{spec.bundle} (manifest {spec.bundle_sha256[:12]})"),
        ("Prompts", f"{len(spec.prompts)} from {spec.prompts_source}"),
        ("Seeds", f"{spec.seeds} of each prompt"),
        ("Images", f"{spec.height}×{spec.width} pixels, guidance {spec.guidance_scale:g}, {spec.batch} at once"),
        ("Engine", spec.engine),
        ("Pruning", settings),
        ("Machine", ", ".join(f"{name} {value}" for name, value in spec.machine.items())),
    ]


def _headline(found: Evaluation) -> tuple[str, ...]:
    """What methods are judged by: scores of the prompt, or else the first metric against the full run."""
    return found.prompt_metrics or found.metrics[:1]


def _main_methods(found: Evaluation) -> list[str]:
    """The policy that the evaluation is about, its variations, and the forecast."""
    compared = list(dict.fromkeys(v.method for v in found.variants if v.method not in (FULL, FEWER_STEPS)))
    main = MAIN_METHOD if MAIN_METHOD in compared else next(iter(compared), "")
    return [method for method in compared if policy_of(method) in (policy_of(main), FORECAST)]


def _main_ratio(found: Evaluation, steps: int) -> float | None:
    return min(found.ratios(steps), key=lambda ratio: abs(ratio - _MAIN_RATIO), default=None)


def _summary(found: Evaluation) -> list[str]:
    sentences = [
        _sentence(found, metric, method, steps, ratio)
        for metric in _headline(found)
        for steps in found.steps
        for ratio in found.ratios(steps)
        for method in _main_methods(found)
    ]
    return [sentence for sentence in sentences if sentence]


def _sentence(found: Evaluation, metric: str, method: str, steps: int, ratio: float) -> str:
    """A method against the full run and fewer steps; empty where there is nothing to say."""
    variant = found.find(method, steps, ratio)
    own = score_interval(found.of(variant), metric)
    if variant is None or own is None:
        return ""
    measure = measure_of(metric)
    against_full = compare(found.of(variant), found.of(found.find(FULL, steps)), metric)
    fewer = found.find(FEWER_STEPS, steps, ratio)
    against_fewer = compare(found.of(variant), found.of(fewer), metric)
    said = f"{variant.title}, {steps} steps: {measure.title} "
    if against_full is None:
        said += f"{own.mean:.{measure.digits}f}"
    else:
        means = [f"{mean:.{measure.digits}f}" for mean in (against_full.mean_a, against_full.mean_b)]
        percent = against_full.percent
        change = f"{_signed(percent.mean, 1)} %" if percent else _signed(against_full.difference.mean, measure.digits)
        limits = _limits(percent, 1) if percent else _limits(against_full.difference, measure.digits)
        said += f"{means[0]}, full {means[1]}: {change} ({limits}), {verdict(against_full.difference, measure)}"
    if fewer is not None and against_fewer is not None:
        difference = against_fewer.difference
        said += f"; against {fewer.title}: {_signed(difference.mean, measure.digits)}"
        said += f" ({_limits(difference, measure.digits)}), {verdict(difference, measure)}"
    compared = next((one.difference.prompts for one in (against_full, against_fewer) if one), own.prompts)
    return f"{said}. {compared} prompt{'s' * (compared != 1)}."


def _columns(found: Evaluation) -> list[str]:
    titles = [measure_of(metric).title for metric in found.metrics]
    of_prompt = [f"{measure_of(metric).title}, change from full (%)" for metric in found.prompt_metrics]
    to_fewer = [f"{measure_of(metric).title}, change from fewer steps" for metric in _headline(found)]
    return ["Method", "MACs", "Throughput (images/s)", "Speed (×)", *titles, *of_prompt, *to_fewer, "Images"]


def _groups(found: Evaluation, steps: int) -> list[Group]:
    full = found.find(FULL, steps)
    groups = [Group(title="", rows=((FULL, _cells(found, full)),))] if full else []
    for ratio in found.ratios(steps):
        rows = tuple((variant.name, _cells(found, variant)) for variant in found.at(steps, ratio))
        groups.append(Group(title=f"keep {ratio:g}", rows=rows))
    return groups


def _cells(found: Evaluation, variant: Variant) -> tuple[Cell, ...]:
    results, full = found.of(variant), found.find(FULL, variant.steps)
    fewer = found.find(FEWER_STEPS, variant.steps, variant.keep_ratio) if variant.method != FULL else None
    scores = [_score(score_interval(results, metric), measure_of(metric)) for metric in found.metrics]
    to_full = [_change(found, variant, full, metric, percent=True) for metric in found.prompt_metrics]
    to_fewer = [_change(found, variant, fewer, metric, percent=False) for metric in _headline(found)]
    return (*_costs(found, variant, full), *scores, *to_full, *to_fewer, Cell(text=str(len(results))))


def _costs(found: Evaluation, variant: Variant, full: Variant | None) -> tuple[Cell, Cell, Cell]:
    """MACs, throughput and speed; engines are not compared with one another."""
    share = f"{100 * variant.macs_all / full.macs_all:.0f} % of full" if full and variant != full else ""
    seconds = median(result.seconds for result in found.of(variant))
    other = bool(full and full.engine != variant.engine)
    speed = Cell(text=_NOTHING)
    if full and not other:
        speed = Cell(text=f"{median(result.seconds for result in found.of(full)) / seconds:.2f}")
    throughput = Cell(text=f"{1 / seconds:#.3g}".rstrip("."), note=f"on {variant.engine}" if other else "")
    return Cell(text=macs(variant.macs_all), note=share), throughput, speed


def _score(interval: Interval | None, measure: Measure) -> Cell:
    if interval is None:
        return Cell(text=_NOTHING)
    spread = f" ± {interval.half_width:.{measure.digits}f}" if interval.prompts > 1 else ""
    left_out = f"{interval.left_out} left out" if interval.left_out else ""
    return Cell(text=f"{interval.mean:.{measure.digits}f}{spread}", note=left_out)


def _change(found: Evaluation, variant: Variant, other: Variant | None, metric: str, *, percent: bool) -> Cell:
    if other is None or other == variant:
        return Cell(text=_NOTHING)
    comparison, measure = compare(found.of(variant), found.of(other), metric), measure_of(metric)
    if comparison is None or (interval := comparison.percent if percent else comparison.difference) is None:
        return Cell(text=_NOTHING)
    digits = 1 if percent else measure.digits
    judged = verdict(comparison.difference, measure)
    return Cell(text=_signed(interval.mean, digits), note=_limits(interval, digits, word=""), verdict=judged)


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _limits(interval: Interval, digits: int, word: str = "95 % CI ") -> str:
    if interval.prompts < 2:
        return "one prompt, no interval"
    return f"{word}{_signed(interval.low, digits)} … {_signed(interval.high, digits)}"


def _sheet(found: Evaluation, steps: int) -> tuple[str, list[str], list[tuple[str, list[Picture]]]]:
    """The first prompts under every method at the main ratio: a title, the columns' names, and a row a prompt."""
    ratio, full = _main_ratio(found, steps), found.find(FULL, steps)
    variants = [*([full] if full else []), *(found.at(steps, ratio) if ratio is not None else [])]
    rows = [
        (found.spec.prompts[prompt], [_sheet_picture(found, variant, prompt) for variant in variants])
        for prompt in range(min(found.spec.sheet, len(found.spec.prompts)))
    ]
    title = f"{steps} steps" + (f", keep {ratio:g}" if ratio is not None else "")
    return title, [v.title for v in variants], [row for row in rows if any(picture.uri for picture in row[1])]


def _sheet_picture(found: Evaluation, variant: Variant, prompt: int) -> Picture:
    result = next((r for r in found.of(variant) if (r.prompt, r.seed) == (prompt, 0)), None)
    values = [(metric, result.scores.get(metric)) for metric in _headline(found)] if result else []
    caption = ", ".join(
        f"{measure_of(metric).title} {value:.{measure_of(metric).digits}f}"
        for metric, value in values
        if value is not None
    )
    return inline_picture(found.directory / IMAGES / variant.key / f"{prompt:05d}-0.png", caption, _SHEET_PIXELS)


def _token_maps(found: Evaluation) -> list[Picture]:
    maps = [
        inline_picture(found.directory / TOKENS / f"{variant.key}.png", f"{variant.title}, {variant.steps} steps")
        for variant in found.variants
    ]
    return [picture for picture in maps if picture.uri]


def _write(path: Path, page: str) -> Path:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # beside it, so that the rename is atomic
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OutputError(
            f"{path}: cannot write the report ({error.strerror or error})", "make room or give another --out"
        ) from error
    return path
