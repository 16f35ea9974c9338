"""SD3-medium at full size, random weights in bf16, to a TensorRT-RTX plan: time and memory; `make bench-export`.

Memory is that of the whole process tree, polled ten times a second. `anonymous` is what the processes allocated;
`resident` adds the pages of files they have mapped (the ONNX file's weights), which the kernel may drop at any time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from machine import write_result
from rich.console import Console

_STAGE = re.compile(r"✓ (.+?) ([\d.]+) s$")


def main() -> None:
    """Export, measure, print, and write benchmarks/results/export.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd3")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--resolution", default="1024x1024")
    parser.add_argument("--name", default="export", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    work = Path("build")  # on a disk: a temporary directory may be memory
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "bundle"
        options = ["--model", arguments.model, "--dtype", arguments.dtype, "--resolution", arguments.resolution]
        command = [sys.executable, "-m", "cat_pruning.exporter.cli", *options, "--random-weights", "--target", "rtx"]
        started = time.perf_counter()
        with subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, text=True) as process:
            resident, anonymous = _watch(process)
            assert process.stderr is not None
            stages = dict(found.groups() for line in process.stderr if (found := _STAGE.search(line.strip())))
        seconds = time.perf_counter() - started
        if process.returncode:
            sys.exit(process.returncode)
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    result = {
        "options": options,
        "seconds": round(seconds, 1),
        "stage_seconds": {title: float(value) for title, value in stages.items()},
        "peak_resident_gb": round(resident / 1e9, 2),
        "peak_anonymous_gb": round(anonymous / 1e9, 2),
        "files": {name: spec["size"] for name, spec in manifest["files"].items()},
        "macs": manifest["macs"],
    }
    Console().print_json(data=result)
    Console().print(f"written to {write_result(arguments.name, result)}")


def _watch(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Peak resident and anonymous bytes of `process` and its children, until it ends."""
    resident = anonymous = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            infos = [_memory(member.pid) for member in (root, *root.children(recursive=True))]
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue  # one has just ended
        resident = max(resident, sum(info["VmRSS"] for info in infos))
        anonymous = max(anonymous, sum(info["RssAnon"] for info in infos))
        time.sleep(0.1)
    return resident, anonymous


def _memory(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    # A process that has just ended has no memory any more.
    return {name: int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "RssAnon")}


if __name__ == "__main__":
    main()
