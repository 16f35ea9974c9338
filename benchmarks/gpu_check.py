"""What needs a GPU, in under ten minutes, into one JSON; `make gpu-check`, or this file with any Python.

The GPU tests, TensorRT and TensorRT-RTX where they are installed, and the benchmarks. It needs a GPU and torch; what a
stage needs besides and does not find is named, and the stage is skipped. Every stage is a process of its own with a
limit, so that one that fails, crashes or takes too long does not stop the next; the JSON is written after each. What
the stages printed is in one log beside it.

In what order they come is what they are worth for their time. `--part 1` and `--part 2` are halves of it for machines
that are there for minutes only: the tests and the main numbers, then the rest of the benchmarks.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_stages import WORDS, Stage, stages
from machine import RESULTS, describe_machine
from source_tree import ROOT, source_tree

MINUTES, PART_MINUTES = 9.5, 6.0
LOG_BYTES = 200_000  # of a stage's words in the log, the last

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


def main(argv: Sequence[str] | None = None, available: Sequence[Stage] | None = None) -> int:
    """Run every stage: 0 if none failed, 1 if one did, 2 and one line where there is no GPU."""
    arguments = _parser().parse_args(argv)
    started = time.monotonic()
    gpu = describe_gpu()
    if "missing" in gpu:
        sys.stderr.write(f"gpu_check needs an NVIDIA GPU, and torch can use none here ({gpu['missing']})\n")
        return 2
    available = stages(arguments.compiled) if available is None else available
    chosen = [
        each
        for each in available
        if (not arguments.only or _is_named(each.name, tuple(arguments.only)))
        and (not arguments.part or each.part == arguments.part)
    ]
    minutes = arguments.minutes or (PART_MINUTES if arguments.part else MINUTES)
    out: Path = arguments.out or default_out(gpu["name"], arguments.part)
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)
    report: dict[str, Any] = {"machine": describe_machine(), "gpu": gpu, "stages": {}}
    environment = stage_environment()
    for stage in chosen:
        left = minutes * 60 - (time.monotonic() - started)
        report["stages"][stage.name] = result = run(stage, environment, left, log)
        report["seconds"] = round(time.monotonic() - started, 1)
        write(out, report)
        message = f", {result['message'].splitlines()[-1]}" if "message" in result else ""
        sys.stdout.write(f"{stage.name}: {result['outcome']}{message} ({result.get('seconds', 0)} s)\n")
        sys.stdout.flush()
    sys.stdout.write(f"wrote {out} and {log}\n")
    return int(any(result["outcome"] == "failed" for result in report["stages"].values()))


def _is_named(name: str, beginnings: tuple[str, ...]) -> bool:
    """Whether a stage's name, or a word of it, begins as asked for."""
    return any(each.startswith(beginnings) for each in (name, *name.split()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="stages with a word that begins so; repeatable (default: all)")
    parser.add_argument("--part", type=int, choices=(1, 2), help="of the stages (default: all, and some in no part)")
    parser.add_argument("--minutes", type=float, help=f"for everything (default: {MINUTES}, of a part {PART_MINUTES})")
    parser.add_argument("--compiled", action="store_true", help="the torch engine compiled, in the benchmarks")
    parser.add_argument(
        "--out", type=Path, help="default: gpu-NAME.json in $OUT, where that is set, or in benchmarks/results"
    )
    return parser


def default_out(name: str, part: int | None) -> Path:
    """Where the report of a GPU of this name goes."""
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / (f"gpu-{slug}-part{part}.json" if part else f"gpu-{slug}.json")


def run(stage: Stage, environment: dict[str, str], left: float, all_logs: Path) -> dict[str, Any]:
    """One stage's outcome; a stage that was stopped or failed still has the numbers that it wrote.

    What it printed is added to `all_logs`.
    """
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
        _add_log(all_logs, stage.name, log)
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


def _add_log(all_logs: Path, name: str, log: Path) -> None:
    all_logs.parent.mkdir(parents=True, exist_ok=True)
    with all_logs.open("ab") as opened:
        opened.write(f"\n===== {name} =====\n".encode() + log.read_bytes()[-LOG_BYTES:])


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
