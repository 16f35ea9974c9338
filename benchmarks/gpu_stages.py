"""The stages of `gpu_check`: what each runs, needs and is allowed, in the order of what they are worth."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNTIME = ("diffusers", "accelerate", "pydantic", "safetensors", "PIL")  # what the drop-in needs besides torch
EXPORT = (*RUNTIME, "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "rich")
KERNELS = ("cuda.bindings", "rich")
TESTS = (*EXPORT, "pytest")
WORDS = 2000  # characters of a failure's last words that are kept


@dataclass(frozen=True)
class Stage:
    """One process.

    command: `{out}` in it is the JSON file that it writes. needs: the modules that it imports. seconds: its limit.
    part: that it belongs to; 0 for none.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    seconds: int
    numbers: Callable[[Path], Any] = lambda out: json.loads(out.read_text(encoding="utf-8"))
    part: int = 0


def stages(compiled: bool = False) -> list[Stage]:
    """In the order in which they are worth having, should the time run out. compiled: for `bench_gpu`."""

    def bench(
        measurements: str, model: str = "", *, seconds: int, rounds: int = 5, part: int = 0, needs: Any = RUNTIME
    ) -> Stage:
        command = [str(HERE / "bench_gpu.py"), *measurements.split(), "--out", "{out}", "--rounds", str(rounds)]
        command += ["--model", model] if model else []
        command += ["--compiled"] if compiled else []
        return Stage(f"{measurements} {model}".strip(), tuple(command), needs, seconds, part=part)

    def plans(engine: str) -> Stage:
        needs = (*EXPORT, engine, *(("cuda.bindings",) if engine == "tensorrt" else ()))  # the plugin's compiler
        return Stage(engine, (str(HERE / "check_engine.py"), engine, "--out", "{out}"), needs, 600)

    def tests(name: str, *arguments: str, needs: tuple[str, ...], seconds: int) -> Stage:
        return Stage(name, _tests(*arguments), needs, seconds, numbers=test_results, part=1)

    # Measurements of one model share a process: a second process would import and make its weights anew.
    return [
        tests("tests", "tests/gpu", needs=TESTS, seconds=180),
        # What needs neither diffusers nor an exporter runs without the conftest, which imports them.
        tests(
            "kernel tests",
            "--noconftest",
            "tests/gpu/test_token_kernels.py",
            needs=("pytest", *KERNELS),
            seconds=60,
        ),
        bench("kernels", seconds=90, rounds=9, part=1, needs=KERNELS),
        bench("matmul selection", seconds=60, part=1, needs=()),
        bench("steps synchronisations loops", "sd3", seconds=150, rounds=3, part=1),
        plans("tensorrt"),
        plans("tensorrt_rtx"),
        bench("fast", "sd3", seconds=150, rounds=3, part=2),
        bench("gemms attention caches kept profile", "sd3", seconds=75, part=2),
        bench("diffusers regional peer-loops", "sd3", seconds=100, rounds=2, part=2),
        bench("steps synchronisations loops diffusers", "pixart-sigma", seconds=75, rounds=2, part=2),
        bench("presets sizes memory threads", "sd3", seconds=100, rounds=2, part=2),
        bench("flux", seconds=110, rounds=3, part=2),
        bench("pipeline", seconds=90, rounds=2, part=2, needs=(*RUNTIME, "transformers")),
        bench("compile", "sd3", seconds=150, rounds=3, part=2),
        bench("float8", "sd3", seconds=150, needs=(*RUNTIME, "torchao"), part=2),
        bench("fast", "pixart-sigma", seconds=150, rounds=3),
        bench("float8", "flux-dev", seconds=200, rounds=2, needs=(*RUNTIME, "torchao")),
        bench("float8", "pixart-sigma", seconds=100, rounds=3, needs=(*RUNTIME, "torchao")),
        bench("regional compile", "pixart-sigma", seconds=150),
        bench("autotune", "sd3", seconds=180),
        bench("autotune", "pixart-sigma", seconds=180),
    ]


def _tests(*arguments: str) -> tuple[str, ...]:
    # Warnings of versions that are not ours are no failures here.
    return ("-m", "pytest", "-q", "-m", "gpu", "-W", "default", "--junitxml", "{out}", *arguments)


def test_results(out: Path) -> dict[str, Any]:
    """Of pytest's JUnit file: how many passed, and the others by name with what they said."""
    results: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in ET.parse(out).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            results["passed"] += 1
        else:
            kind = "skipped" if problem.tag == "skipped" else "failed"
            results[kind][name] = (problem.get("message") or "")[:WORDS]
    return results
