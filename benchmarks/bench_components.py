"""Text encoders and autoencoder as graphs against torch's own: `make bench-components`.

    image TORCH GRAPHS    two bundles of one model: load to first image, memory, and an image's time by stage
    parts                 CLIP-L, two layers of T5-XXL, SD3's autoencoder: one run in torch and under ONNX Runtime
    export PART           a part of full size from a checkpoint on disk: time and memory of its export

Contestants take turns, each process of `image` is a fresh one, and medians are told.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from bench_export import watch, write_shards
from component_parts import PARTS, clip_l, filled, hollow, t5_xxl, vae_16_channels
from machine import write_result
from timing import Run, interleaved, seconds_of
from torch import nn

from cat_pruning.checkpoints.random_weights import RandomWeights
from cat_pruning.components import ATTENTION_MASK, IMAGE, INPUT_IDS, LATENTS
from cat_pruning.dtype import DType
from cat_pruning.engines.component_engine import ComponentEngine
from cat_pruning.engines.onnxruntime_component import OnnxRuntimeComponent
from cat_pruning.exporter.components import WantedPart, export_components, export_part, wrapped
from cat_pruning.exporter.progress import logged_stage

PROMPT: Final = "a large red circle left of a small blue star on a plain black background"
_CPU: Final = torch.device("cpu")
# Run with a bundle, a guidance scale and a number of images; tells of each its seconds by stage.
_ONE: Final = """
import json, sys, time
started = time.perf_counter()
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.tools.generate import GenerateConfig, generate
pipe = load_pipeline(sys.argv[1], "onnxruntime")
loaded = time.perf_counter() - started
pipe.set_progress_bar_config(disable=True)
config = GenerateConfig(prompts=(sys.argv[3],), height=128, width=128, steps=28, guidance_scale=float(sys.argv[2]))
runs = []
for index in range(int(sys.argv[4])):
    run = generate(pipe, pipe.transformer.settings, config)
    runs.append(run.stage_seconds)
    first = time.perf_counter() - started if not index else first
import resource
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"loaded": loaded, "first_image": first, "peak_mib": memory, "stages": runs}))
"""


def main() -> None:
    """Measure, print, and write benchmarks/results/components-*.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="what")
    image = commands.add_parser("image")
    image.add_argument("torch", type=Path)
    image.add_argument("graphs", type=Path)
    image.add_argument("--guidance-scale", type=float, default=3.0)
    image.add_argument("--rounds", type=int, default=5)
    parts = commands.add_parser("parts")
    parts.add_argument("--rounds", type=int, default=5)
    export = commands.add_parser("export")
    export.add_argument("part", choices=PARTS)
    export.add_argument("--dtype", type=DType, choices=list(DType), default=DType.BF16)
    worker = commands.add_parser("export-folder")  # what `export` watches
    worker.add_argument("part", choices=PARTS)
    worker.add_argument("folder", type=Path)
    worker.add_argument("out", type=Path)
    worker.add_argument("dtype", type=DType)
    arguments = parser.parse_args()
    if arguments.what == "image":
        _tell("components-image", _images(arguments))
    elif arguments.what == "parts":
        _tell("components-parts", _parts(arguments.rounds))
    elif arguments.what == "export":
        _tell(f"components-export-{arguments.part}", _export(arguments.part, arguments.dtype))
    else:
        _export_folder(arguments.part, arguments.folder, arguments.out, arguments.dtype)


def _tell(name: str, result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2))  # noqa: T201
    print(write_result(name, result))  # noqa: T201


def _images(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {"torch": [], "graphs": []}
    for _ in range(arguments.rounds):
        for name, runs in found.items():
            command = [sys.executable, "-c", _ONE, str(getattr(arguments, name)), str(arguments.guidance_scale), PROMPT]
            runs.append(json.loads(subprocess.run([*command, "4"], stdout=subprocess.PIPE, check=True).stdout))
    return {"rounds": arguments.rounds} | {name: _medians(runs) for name, runs in found.items()}


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    alone = {name: statistics.median(run[name] for run in runs) for name in ("loaded", "first_image", "peak_mib")}
    later = [stages for run in runs for stages in run["stages"][1:]]  # the first image's read the weights
    stages = {f"{stage}_ms": 1e3 * statistics.median(each[stage] for each in later) for stage in later[0]}
    return {name: round(value, 3) for name, value in {**alone, **stages}.items()}


def _parts(rounds: int) -> dict[str, Any]:
    text = torch.ones(1, 128).int()
    rows = {
        "CLIP-L, 2 prompts of 77 tokens": _part(rounds, clip_l, "text_encoder", {INPUT_IDS: torch.ones(2, 77).int()}),
        "2 of T5-XXL's 24 layers, 128 tokens": _part(
            rounds, lambda: t5_xxl(2), "text_encoder_3", {INPUT_IDS: text, ATTENTION_MASK: text}
        ),
        "SD3's VAE, decoding 256x256": _part(rounds, vae_16_channels, "vae", {LATENTS: torch.randn(1, 16, 32, 32)}),
        "SD3's VAE, encoding 256x256": _part(rounds, vae_16_channels, "vae", {IMAGE: torch.randn(1, 3, 256, 256)}),
    }
    return {"rounds": rounds, "threads": torch.get_num_threads(), "rows": rows}


@torch.inference_mode()
def _part(rounds: int, make: Callable[[], nn.Module], part: str, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """One run of a part's graph in torch and under ONNX Runtime: medians, and that of the rounds' ratios."""
    module = filled(make)
    with tempfile.TemporaryDirectory(dir="build") as folder:
        specs = export_part(part, module, Path(folder), 128)
        spec = next(each for each in specs if {tensor.name for tensor in each.inputs} == set(inputs))
        path = Path(folder) / spec.file
        engine = ComponentEngine(spec, lambda: OnnxRuntimeComponent(spec, path, _CPU, 8), DType.FP32, _CPU)
        loading = seconds_of(engine.load, _CPU)
        wrapper = wrapped(spec.component, module)
        runs: dict[str, Run] = {"torch": lambda: wrapper(**inputs), "graph": lambda: engine.run(inputs)}
        times = interleaved(runs, rounds, _CPU, warm_rounds=1)
    ratio = statistics.median(a / b for a, b in zip(times["torch"], times["graph"], strict=True))
    medians = {f"{name}_ms": round(statistics.median(each), 1) for name, each in times.items()}
    return {**medians, "torch_over_graph": round(ratio, 3), "load_s": round(loading, 2)}


def _export(part: str, dtype: DType) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir="build") as place:
        folder, out = Path(place) / "part", Path(place) / "out"
        out.mkdir()
        module = hollow(PARTS[part][1])
        weights = RandomWeights(module, dtype, seed=0)
        folder.mkdir()
        module.config.save_pretrained(folder) if hasattr(module.config, "save_pretrained") else module.save_config(
            folder
        )
        write_shards(folder, weights, "model" if part != "vae" else "diffusion_pytorch_model")
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        command = [sys.executable, __file__, "export-folder", part, str(folder), str(out), str(dtype)]
        started = time.perf_counter()
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            resident, anonymous = watch(process)
            assert process.stderr is not None
            log = process.stderr.read()
        if process.returncode:
            sys.exit(log)
        seconds = time.perf_counter() - started
        files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return {
        "part": part,
        "dtype": str(dtype),
        "weights_gb": round(size / 1e9, 2),
        "seconds": round(seconds, 1),
        "peak_resident_gb": round(resident / 1e9, 2),
        "peak_anonymous_gb": round(anonymous / 1e9, 2),
        "files": files,
        "load": os.getloadavg()[0],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def _export_folder(part: str, folder: Path, out: Path, dtype: DType) -> None:
    name, make = PARTS[part]
    wanted = WantedPart(name=name, part_class=type(hollow(make)), folder=folder)
    export_components([wanted], out, dtype, 256, logged_stage, verify=False)


if __name__ == "__main__":
    main()
