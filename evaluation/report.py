"""An evaluation as one HTML page that loads nothing: tables in the layout of the paper's 2 and 3, curves, images."""

from __future__ import annotations

from pathlib import Path

import jinja2

from cat_pruning.errors import OutputError
from cat_pruning.evaluation.candidates import Candidate
from cat_pruning.evaluation.charts import Picture, inline_picture, quality_curves
from cat_pruning.evaluation.measures import measure_of
from cat_pruning.evaluation.outcome import Outcome
from cat_pruning.evaluation.place import REPORT, picture_place, token_map_place
from cat_pruning.evaluation.results import RunSpec
from cat_pruning.evaluation.tables import columns, groups
from cat_pruning.evaluation.wording import summary
from cat_pruning.files import write_whole

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_MAIN_RATIO = 0.3
_SHEET_PIXELS = 512  # larger images are reduced to this: a page of full ones would be hundreds of megabytes


def write_report(directory: Path) -> Path:
    """Write the report of an evaluation, finished or not, into its directory.

    Args:
        directory: that a `ResultStore` wrote.

    Returns:
        The page; an existing one is replaced at once, never half.

    Raises:
        SettingsError: no evaluation, or no results yet.
        OutputError: the page cannot be written.
    """
    found = Outcome(directory)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    done, wanted = found.scored()
    kinds = [(metric, False) for metric in found.metrics] + [(metric, True) for metric in found.prompt_metrics]
    drawn = [candidate for candidate in found.spec.candidates if not candidate.quantization]  # their MACs cost the same
    curves = [quality_curves(drawn, found.results, metric, less_full=less_full) for metric, less_full in kinds]
    page = template.render(
        spec=found.spec,
        facts=_facts(found.spec),
        done=done,
        wanted=wanted,
        missing=[candidate.key for candidate in found.spec.candidates if candidate.key not in found.results],
        summary=summary(found),
        columns=columns(found),
        tables=[(steps, groups(found, steps)) for steps in found.steps],
        curves=[curve for curve in curves if curve],
        sheets=[_sheet(found, steps) for steps in found.steps],
        token_maps=_token_maps(found),
    )
    return _write(directory / REPORT, page)


def _facts(spec: RunSpec) -> list[tuple[str, str]]:
    settings = ", ".join(f"{name} {value}" for name, value in spec.settings.items() if name != "keep_ratio")
    digests = {each.quantization: each.quantized_sha256 for each in spec.candidates if each.quantization}
    quantized = ", ".join(f"{name} (manifest {digest[:12]})" for name, digest in digests.items())
    return [
        ("Bundle", f"{spec.bundle} (manifest {spec.bundle_sha256[:12]})"),
        *([("Quantized", quantized)] if quantized else []),
        ("Prompts", f"{len(spec.prompts)} from {spec.prompts_source}"),
        ("Seeds", f"{spec.seeds} of each prompt"),
        ("Images", f"{spec.height}×{spec.width} pixels, guidance {spec.guidance_scale:g}, {spec.batch} at once"),
        ("Engine", spec.engine),
        ("Pruning", settings),
        ("Machine", ", ".join(f"{name} {value}" for name, value in spec.machine.items())),
    ]


def _main_ratio(found: Outcome, steps: int) -> float | None:
    return min(found.ratios(steps), key=lambda ratio: abs(ratio - _MAIN_RATIO), default=None)


def _sheet(found: Outcome, steps: int) -> tuple[str, list[str], list[tuple[str, list[Picture]]]]:
    """The first prompts under every method at the main ratio: a title, the columns' names, and a row a prompt."""
    ratio = _main_ratio(found, steps)
    candidates = [*found.full_runs(steps), *(found.at(steps, ratio) if ratio is not None else [])]
    rows = [
        (found.spec.prompts[prompt], [_sheet_picture(found, candidate, prompt) for candidate in candidates])
        for prompt in range(min(found.spec.sheet, len(found.spec.prompts)))
    ]
    title = f"{steps} steps" + (f", keep {ratio:g}" if ratio is not None else "")
    names = [candidate.title for candidate in candidates]
    return title, names, [row for row in rows if any(picture.uri for picture in row[1])]


def _sheet_picture(found: Outcome, candidate: Candidate, prompt: int) -> Picture:
    result = next((r for r in found.of(candidate) if (r.prompt, r.seed) == (prompt, 0)), None)
    values = [(metric, result.scores.get(metric)) for metric in found.headline] if result else []
    caption = ", ".join(
        f"{measure_of(metric).title} {value:.{measure_of(metric).digits}f}"
        for metric, value in values
        if value is not None
    )
    return inline_picture(found.directory / picture_place(candidate.key, prompt), caption, _SHEET_PIXELS)


def _token_maps(found: Outcome) -> list[Picture]:
    maps = [
        inline_picture(found.directory / token_map_place(candidate.key), f"{candidate.title}, {candidate.steps} steps")
        for candidate in found.candidates
    ]
    return [picture for picture in maps if picture.uri]


def _write(path: Path, page: str) -> Path:
    try:
        write_whole(path, page)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot write the report ({error.strerror or error})", "make room or give another --out"
        ) from error
    return path
