"""The numbers of an evaluation, without its images, into results/eval.json; the last line of `make eval`.

    python benchmarks/keep_eval.py build/eval/results

Of every variant: MACs, images, median seconds, each metric's mean and 95 % interval, and its paired difference from
the full run and from as few steps as cost the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from machine import write_result

from cat_pruning.evaluation.statistics import Evaluation, Interval, compare, score_interval
from cat_pruning.evaluation.variants import FEWER_STEPS, FULL, Variant


def main() -> None:
    """Read the evaluation and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="that cat-eval wrote")
    parser.add_argument("--name", default="eval", help="of the file in benchmarks/results (default: eval)")
    arguments = parser.parse_args()
    found = Evaluation(arguments.directory)
    spec = found.spec
    result = {
        "bundle": spec.bundle,
        "prompts": f"{len(spec.prompts)} from {spec.prompts_source}",
        "seeds": spec.seeds,
        "guidance_scale": spec.guidance_scale,
        "engine": spec.engine,
        "images": dict(zip(("done", "wanted"), found.scored(), strict=True)),
        "hours_of_images": sum(each.seconds for some in found.results.values() for each in some) / 3600,
        "variants": {variant.key: _numbers(found, variant) for variant in found.variants},
    }
    print(f"written to {write_result(arguments.name, result)}")  # noqa: T201


def _numbers(found: Evaluation, variant: Variant) -> dict[str, Any]:
    results = found.of(variant)
    full, fewer = found.find(FULL, variant.steps), found.find(FEWER_STEPS, variant.steps, variant.keep_ratio)
    return {
        "name": variant.name,
        "macs": variant.macs_all,
        "full_steps": variant.full_steps,
        "images": len(results),
        "seconds": round(median(result.seconds for result in results), 3),
        "scores": {metric: _interval(score_interval(results, metric)) for metric in found.metrics},
        "less_full": _differences(found, variant, full),
        "less_fewer_steps": _differences(found, variant, fewer),
    }


def _differences(found: Evaluation, variant: Variant, other: Variant | None) -> dict[str, Any]:
    if other is None or variant in (other, found.find(FULL, variant.steps)):
        return {}
    compared = {metric: compare(found.of(variant), found.of(other), metric) for metric in found.metrics}
    return {metric: _interval(each.difference) for metric, each in compared.items() if each is not None}


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    half_width = round(interval.half_width, 5) if interval.prompts > 1 else None
    return {"mean": round(interval.mean, 5), "half_width": half_width, "prompts": interval.prompts}


if __name__ == "__main__":
    main()
