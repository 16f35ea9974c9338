"""Everything that needs a GPU, in under ten minutes, into one JSON; `make gpu-check`, or this file with any Python.

The GPU tests, TensorRT and TensorRT-RTX where they are installed, and the benchmarks. It needs a GPU and torch; what a
stage needs besides and does not find is named, and the stage is skipped. Every stage is a process of its own with a
limit, so that one that fails, crashes or takes too long does not stop the next; the JSON is written after each.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import RESULTS, describe_machine
from source_tree import ROOT, source_tree

HERE = Path(__file__).parent
RUNTIME = ("diffusers", "accelerate", "pydantic", "safetensors", "PIL")  # what the drop-in needs besides torch
EXPORT = (*RUNTIME, "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "rich")
KERNELS = ("cuda.bindings", "rich")
TESTS = (*EXPORT, "pytest")
MINUTES = 9.5
WORDS = 2000  # characters of a failure's last words that are kept

# What the GPU is, as torch sees it; a process of its own, so that this one holds no memory on it.
_DESCRIBE = """
import json, warnings
warnings.simplefilter("ignore")
try:
    import torch
    torch.cuda.init()
    torch.zeros(1, device="cuda")
except Exception as error:
    print(json.dumps({"missing": " ".join(str(error).split()) or type(error).__name__}))
else:
    card = torch.cuda.get_device_properties(0)
    print(json.dumps({
        "name": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "memory_gib": round(card.total_memory / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "l2_mb": getattr(card, "L2_cache_size", 0) / 1e6,
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }))
"""


@dataclass(frozen=True)
class Stage:
    """One process. `needs`: the modules that it imports. `{out}` in its command is the JSON file that it writes."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    seconds: int
    numbers: Callable[[Path], Any] = lambda out: json.loads(out.read_text(encoding="utf-8"))


def stages() -> list[Stage]:
    """In the order in which they are worth having, should the time run out."""

    def bench(measurement: str, seconds: int, needs: tuple[str, ...], *models: str) -> list[Stage]:
        command = (str(HERE / "bench_gpu.py"), measurement, "--out", "{out}")
        return [
            Stage(f"{measurement} {model}".strip(), (*command, *(["--model", model] if model else [])), needs, seconds)
            for model in models or ("",)
        ]

    def plans(engine: str) -> Stage:
        needs = (*EXPORT, engine, *(("cuda.bindings",) if engine == "tensorrt" else ()))  # the plugin's compiler
        return Stage(engine, (str(HERE / "check_engine.py"), engine, "--out", "{out}"), needs, 600)

    models = ("sd3", "pixart-sigma")
    return [
        *bench("matmul", 60, ()),
        *bench("selection", 60, ()),
        *bench("kernels", 90, KERNELS),
        Stage("tests", _tests("tests/gpu"), TESTS, 180, numbers=test_results),
        # What needs neither diffusers nor an exporter runs without the conftest, which imports them.
        Stage(
            "kernel tests",
            _tests("--noconftest", "tests/gpu/test_token_kernels.py"),
            ("pytest", *KERNELS),
            60,
            numbers=test_results,
        ),
        *bench("steps", 90, RUNTIME, *models),
        *bench("synchronisations", 60, RUNTIME, *models),
        *bench("loops", 150, RUNTIME, *models),
        plans("tensorrt"),
        plans("tensorrt_rtx"),
        *bench("diffusers", 60, RUNTIME, *models),
        *bench("compile", 120, RUNTIME, *models),
        *bench("autotune", 180, RUNTIME, *models),
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


def main(argv: Sequence[str] | None = None, available: Sequence[Stage] | None = None) -> int:
    """Run every stage: 0 if none failed, 1 if one did, 2 and one line where there is no GPU."""
    available = stages() if available is None else available
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="stages whose name begins so; repeatable (default: all)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-NAME.json")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    gpu = describe_gpu()
    if "missing" in gpu:
        sys.stderr.write(f"gpu_check needs an NVIDIA GPU, and torch can use none here ({gpu['missing']})\n")
        return 2
    chosen = [each for each in available if not arguments.only or each.name.startswith(tuple(arguments.only))]
    out: Path = arguments.out or RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu['name'].lower()).strip('-')}.json"
    report: dict[str, Any] = {"machine": describe_machine(), "gpu": gpu, "stages": {}}
    environment = stage_environment()
    for stage in chosen:
        left = arguments.minutes * 60 - (time.monotonic() - started)
        report["stages"][stage.name] = result = run(stage, environment, left)
        report["seconds"] = round(time.monotonic() - started, 1)
        write(out, report)
        line = f"{stage.name}: {result['outcome']}"
        sys.stdout.write(line + (f", {result['message'].splitlines()[-1]}" if "message" in result else "") + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"wrote {out}\n")
    return int(any(result["outcome"] == "failed" for result in report["stages"].values()))


def run(stage: Stage, environment: dict[str, str], left: float) -> dict[str, Any]:
    """One stage's outcome; a stage that was stopped or failed still has the numbers that it wrote."""
    if missing := [name for name in stage.needs if not is_there(name)]:
        return {"outcome": "skipped", "message": f"{', '.join(missing)} not installed"}
    limit = min(stage.seconds, left)
    if limit < 5:
        return {"outcome": "skipped", "message": "the time is up"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out", Path(folder) / "log"
        command = [sys.executable, *(part.replace("{out}", str(out)) for part in stage.command)]
        with log.open("wb") as opened:
            # A session of its own: the children of what is stopped are stopped too.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=opened, stderr=opened, start_new_session=True
            )
            try:
                process.wait(limit)
                ended = True
            except subprocess.TimeoutExpired:
                ended = False
            finally:
                _stop(process)
        result: dict[str, Any] = {"outcome": "ok", "seconds": round(time.monotonic() - started, 1)}
        if not ended:
            result |= {"outcome": "failed", "message": f"stopped after {limit:.0f} seconds"}
        elif process.returncode:
            words = log.read_text(encoding="utf-8", errors="replace").strip()[-WORDS:]
            result |= {"outcome": "failed", "message": words or f"exit code {process.returncode}"}
        try:
            result["numbers"] = stage.numbers(out)
        except (OSError, ValueError, ET.ParseError):
            if result["outcome"] == "ok":
                result |= {"outcome": "failed", "message": "it wrote nothing"}
    return result


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a stage: the group that it began, and no other."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def describe_gpu() -> dict[str, Any]:
    """The first GPU, or `missing`: why there is none."""
    if not is_there("torch"):
        return {"missing": "torch is not installed"}
    done = subprocess.run([sys.executable, "-c", _DESCRIBE], capture_output=True, text=True, check=False)
    try:
        gpu: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"missing": (done.stderr.strip().splitlines() or ["torch cannot be imported"])[-1]}
    return gpu if "missing" in gpu else {**gpu, "driver": driver_version()}


def driver_version() -> str:
    """As nvidia-smi says."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return done.stdout.splitlines()[0].strip()


def is_there(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # its parent
        return False


def stage_environment() -> dict[str, str]:
    """The processes' environment: the package from this checkout, where it is not installed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    if not is_there("cat_pruning"):
        paths = [str(source_tree()), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def write(out: Path, report: dict[str, Any]) -> None:
    """Whole, or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    half = out.with_suffix(".part")
    half.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    half.replace(out)


if __name__ == "__main__":
    sys.exit(main())
