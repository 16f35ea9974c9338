"""A full-size export with random weights: time and memory of each stage; `make bench-export`.

Memory is that of the whole process tree, polled ten times a second. `anonymous` is what the processes allocated;
`resident` adds the pages of files they have mapped (a checkpoint's weights), which the kernel may drop at any time.

Random weights are made one at a time while they are written, so they say nothing about the memory that a checkpoint
needs. `--from-directory` first writes them as one, sharded safetensors as on the hub, and measures an export of that.
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
from safetensors.torch import save_file

from cat_pruning.checkpoints.published import published_models
from cat_pruning.checkpoints.random_weights import RandomWeights, hollow_transformer
from cat_pruning.dtype import DType

_STAGE = re.compile(r"✓ (.+?) ([\d.]+) s$")
_SHARD_BYTES = 4 << 30


def main() -> None:
    """Export, measure, print, and write benchmarks/results/export-MODEL[-from-directory].json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd3")
    parser.add_argument("--dtype", type=DType, choices=list(DType), default=DType.BF16)
    parser.add_argument("--resolution", default="1024x1024")
    parser.add_argument("--target", default="tensorrt_rtx", choices=["onnx", "tensorrt_rtx"])
    parser.add_argument("--from-directory", action="store_true", help="export a checkpoint on disk")
    parser.add_argument("--name", help="of the file in benchmarks/results (default: export-MODEL[-from-directory])")
    arguments = parser.parse_args()
    work = Path("build")  # on a disk: a temporary directory may be memory
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out, source = Path(folder) / "bundle", [arguments.model, "--random-weights"]
        if arguments.from_directory:
            source = [str(_write_checkpoint(Path(folder) / "transformer", arguments.model, arguments.dtype))]
        options = ["--dtype", arguments.dtype, "--resolution", arguments.resolution, "--target", arguments.target]
        command = [sys.executable, "-m", "cat_pruning.exporter.cli", "--model", *source, *options]
        started = time.perf_counter()
        with subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, text=True) as process:
            resident, anonymous = watch(process)
            assert process.stderr is not None
            log = process.stderr.readlines()
        seconds = time.perf_counter() - started
        if process.returncode:
            sys.exit("".join(log))
        stages = dict(found.groups() for line in log if (found := _STAGE.search(line.strip())))
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    result = {
        "model": arguments.model,
        "weights": "a checkpoint on disk" if arguments.from_directory else "random, made while they are written",
        "options": options,
        "seconds": round(seconds, 1),
        "stage_seconds": {title: float(value) for title, value in stages.items()},
        "peak_resident_gb": round(resident / 1e9, 2),
        "peak_anonymous_gb": round(anonymous / 1e9, 2),
        "files": {name: spec["size"] for name, spec in manifest["files"].items()},
        "macs": manifest["macs"],
    }
    Console().print_json(data=result)
    name = f"export-{arguments.model}" + ("-from-directory" if arguments.from_directory else "")
    Console().print(f"written to {write_result(arguments.name or name, result)}")


def _write_checkpoint(folder: Path, model: str, dtype: DType) -> Path:
    """The published architecture with random weights as `save_pretrained` would write it, a shard at a time."""
    published = published_models()[model]
    hollow = hollow_transformer(published.transformer_class, published.transformer, dtype)
    weights = RandomWeights(hollow, dtype, seed=0)
    hollow.save_config(folder)
    write_shards(folder, weights, "diffusion_pytorch_model")
    return folder


def write_shards(folder: Path, weights: RandomWeights, stem: str) -> None:
    """Random weights as `save_pretrained` would write them, a shard at a time."""
    shards: list[list[str]] = [[]]
    num_bytes, size = weights.dtype.num_bytes, 0
    for name, shape in weights.shapes.items():
        size += shape.numel() * num_bytes
        if size > _SHARD_BYTES:
            shards.append([])
            size = shape.numel() * num_bytes
        shards[-1].append(name)
    index = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: weights(name) for name in names}, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
    total = sum(shape.numel() * num_bytes for shape in weights.shapes.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content))


def watch(process: subprocess.Popen[str]) -> tuple[int, int]:
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
