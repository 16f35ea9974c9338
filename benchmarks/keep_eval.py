"""The numbers of an evaluation, without its images, into results/eval.json; the last line of `make eval`.

    python benchmarks/keep_eval.py build/eval/results

Of every candidate: MACs, images, median seconds and CPU seconds, the median of the full run's CPU seconds of an image
over its own, each metric's mean and 95 % interval, and its paired difference from the full run, of scores by the prompt
in percent too, and from as few steps as cost the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from machine import write_result

from cat_pruning.evaluation.candidates import FULL, Candidate
from cat_pruning.evaluation.intervals import Interval
from cat_pruning.evaluation.outcome import Outcome
from cat_pruning.evaluation.paired import paired_difference, paired_scores, score_interval


def main() -> None:
    """Read the evaluation and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="that cat-eval wrote")
    parser.add_argument("--name", default="eval", help="of the file in benchmarks/results (default: eval)")
    arguments = parser.parse_args()
    found = Outcome(arguments.directory)
    spec = found.spec
    result = {
        "bundle": spec.bundle,
        "prompts": f"{len(spec.prompts)} from {spec.prompts_source}",
        "seeds": spec.seeds,
        "guidance_scale": spec.guidance_scale,
        "engine": spec.engine,
        "images": dict(zip(("done", "wanted"), found.scored(), strict=True)),
        "hours_of_images": sum(each.seconds for some in found.results.values() for each in some) / 3600,
        "candidates": {candidate.key: _numbers(found, candidate) for candidate in found.candidates},
    }
    print(f"written to {write_result(arguments.name, result)}")  # noqa: T201


def _numbers(found: Outcome, candidate: Candidate) -> dict[str, Any]:
    results = found.of(candidate)
    full, fewer = found.find(FULL, candidate.steps), found.fewer_steps(candidate)
    return {
        "name": candidate.name,
        "macs": candidate.macs_all,
        "full_steps": candidate.full_steps,
        "images": len(results),
        "seconds": round(median(result.seconds for result in results), 3),
        **_cpu(found, candidate, full),
        "scores": {metric: _interval(score_interval(results, metric)) for metric in found.metrics},
        "less_full": _differences(found, candidate, full),
        "less_full_percent": _percent(found, candidate, full),
        "less_fewer_steps": _differences(found, candidate, fewer),
    }


def _cpu(found: Outcome, candidate: Candidate, full: Candidate | None) -> dict[str, float]:
    seconds = found.cpu_seconds(candidate)
    if seconds is None:
        return {}
    own, others = ({(each.prompt, each.seed): each.cpu_seconds for each in found.of(one)} for one in (candidate, full))
    ratios = [theirs / mine for image, mine in own.items() if mine and (theirs := others.get(image))]
    return {"cpu_seconds": round(seconds, 3), **({"cpu_speedup": round(median(ratios), 3)} if ratios else {})}


def _differences(found: Outcome, candidate: Candidate, other: Candidate | None) -> dict[str, Any]:
    if other is None or candidate in (other, found.find(FULL, candidate.steps)):
        return {}
    compared = {metric: paired_difference(found.of(candidate), found.of(other), metric) for metric in found.metrics}
    return {metric: _interval(difference) for metric, difference in compared.items() if difference is not None}


def _percent(found: Outcome, candidate: Candidate, full: Candidate | None) -> dict[str, Any]:
    if full is None or candidate == full:
        return {}
    compared = {metric: paired_scores(found.of(candidate), found.of(full), metric) for metric in found.prompt_metrics}
    return {metric: _interval(paired.percent) for metric, paired in compared.items() if paired is not None}


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    half_width = round(interval.half_width, 5) if interval.prompts > 1 else None
    return {"mean": round(interval.mean, 5), "half_width": half_width, "prompts": interval.prompts}


if __name__ == "__main__":
    main()
