"""Engine plans from the graphs of a bundle.

A plan is built in a process of its own (`cat_pruning.engines.plan_builder`): the builder's memory goes back to the
system, the weights are not held twice, and a crash inside the builder is an error here and not the end of the process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cat_pruning.engines.profiles import PlanProfile
from cat_pruning.engines.records import PlanSpec
from cat_pruning.errors import EngineError
from cat_pruning.step_io import Part

# The builder copies and frees weights of many sizes; with a fixed threshold glibc gives them back at once. Measured on
# SD3-medium: 0.7 GB less at the peak. Elsewhere than in glibc nobody reads it.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
# What a plan of TensorRT-RTX runs on unless it is built for something else: these "and later".
_RTX_ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")


def can_build_rtx() -> bool:
    """Whether TensorRT-RTX and Polygraphy are installed; a GPU is not needed."""
    return all(importlib.util.find_spec(name) is not None for name in ("tensorrt_rtx", "polygraphy"))


def rtx_plan_specs() -> tuple[PlanSpec, ...]:
    """What the installed TensorRT-RTX builds, one plan for every graph, and where in the bundle they go.

    Raises:
        EngineError: it is not installed.
    """
    if not can_build_rtx():
        raise EngineError("--target rtx: TensorRT-RTX is not installed here; pip install 'cat-pruning[rtx]'")
    version = importlib.metadata.version("tensorrt_rtx_cu13")
    folder = f"plans/tensorrt_rtx-{version}-{_RTX_ARCHITECTURES[0]}-and-later"
    return tuple(
        PlanSpec(
            part=part,
            flavour="tensorrt_rtx",
            version=version,
            architectures=_RTX_ARCHITECTURES,
            file=f"{folder}/{part}.plan",
        )
        for part in Part
    )


def build_rtx_plan(onnx: Path, plan: Path, profiles: Sequence[PlanProfile]) -> None:
    """Build `plan` from the graph `onnx`, with one profile per entry of `profiles`. Needs no GPU.

    Raises:
        EngineError: the builder refused the graph, or its process died.
        OSError: the plan cannot be written.
    """
    plan.parent.mkdir(parents=True, exist_ok=True)
    job = {"onnx": str(onnx), "plan": str(plan), "profiles": list(profiles)}
    result = subprocess.run(
        [sys.executable, "-m", "cat_pruning.engines.plan_builder"],
        input=json.dumps(job),
        capture_output=True,
        env=os.environ | _MALLOC,
        text=True,
        check=False,
    )
    if result.returncode == 0:
        return
    report = json.loads(result.stdout) if result.stdout.startswith("{") else {}
    if "errno" in report:
        raise OSError(report["errno"], report["problem"], str(plan))
    problem = _refusal(report["problem"], result.stderr) if "problem" in report else _last_words(result)
    raise EngineError(f"TensorRT-RTX cannot build {onnx.name}: {problem}")


def _refusal(problem: str, log: str) -> str:
    """The builder's first error, which the later ones follow from, in one line; `problem` where it logged none."""
    errors = [line.partition("[E]")[2].strip() for line in log.splitlines() if "[E]" in line]
    return " ".join((errors[0] if errors else problem).split())[:400]


def _last_words(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    died = f"its process ended with {result.returncode}"
    if result.returncode == -9:
        died += " (killed: probably out of memory; it needs about twice the weights)"
    return f"{died}: {lines[-1]}" if lines else died
