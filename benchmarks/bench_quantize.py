"""The step in eight and four bits against fp32 under ONNX Runtime: `make bench-quantize`.

    steps        CPU time of a full and a pruned step, the size of the weights, the error of the noise
    quantizers   time and memory of the quantizers themselves, at a published size with random weights

`steps` takes the sizes of bench_step.py: 6 layers, width 512, 1,024 tokens; one thread. Contestants take turns within
every round; what is told is the median over the rounds, and the median of the ratios within a round. CPU time is told,
because machines are shared. What images lose is `cat-eval --quantized`'s: `make eval-quantized`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from bench_step import CONFIGS, GRID, TEXT_LENGTHS
from machine import write_result
from timing import ratio

from cat_pruning.checkpoints.random_weights import random_transformer
from cat_pruning.dtype import DType
from cat_pruning.engines.onnxruntime_graphs import EXACT_PRODUCTS
from cat_pruning.engines.onnxruntime_sessions import quiet_session, run_quietly
from cat_pruning.exporter.calibration import watched
from cat_pruning.exporter.export import ExportConfig, export
from cat_pruning.exporter.quantize import quantize_step
from cat_pruning.exporter.step_graph import example_inputs, export_step_graph, run_step
from cat_pruning.exporter.verify import run_graphs
from cat_pruning.families import family_class_named, family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.names import Quantization, Target
from cat_pruning.step_io import NOISE, Part, output_name


def main() -> None:
    """Measure, print, and write benchmarks/results/quantize-*.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="what")
    steps = commands.add_parser("steps")
    steps.add_argument("--family", choices=list(CONFIGS), default="sd3")
    steps.add_argument("--rounds", type=int, default=5)
    steps.add_argument("--keep-ratio", type=float, default=0.3)
    quantizers = commands.add_parser("quantizers")
    quantizers.add_argument("--model", default="pixart-sigma")
    one = commands.add_parser("one", help="what `quantizers` runs in processes of their own")
    one.add_argument("directory", type=Path)
    one.add_argument("quantization", type=Quantization)
    arguments = parser.parse_args()
    if arguments.what == "one":
        print(json.dumps(_quantize_alone(arguments.directory, arguments.quantization)))  # noqa: T201
        return
    result = _steps(arguments) if arguments.what == "steps" else _quantizers(arguments.model)
    print(json.dumps(result, indent=2))  # noqa: T201
    print(write_result(f"quantize-{arguments.what}", result))  # noqa: T201


def _steps(arguments: argparse.Namespace) -> dict[str, Any]:
    config = CONFIGS[arguments.family]
    transformer_class = family_class_named(arguments.family).transformer_class
    transformer: Any = random_transformer(transformer_class, config, DType.FP32, seed=0)
    step = StepModule(transformer, family_of(transformer))
    num_tokens = GRID[0] * GRID[1]
    result: dict[str, Any] = {"family": arguments.family, "tokens": num_tokens, "rounds": arguments.rounds}
    with tempfile.TemporaryDirectory() as folder:
        graphs = Path(folder) / "fp32"
        graphs.mkdir()
        export_step_graph(step, graphs)
        inputs = {}
        for kind, kept in (("full", num_tokens), ("pruned", int(arguments.keep_ratio * num_tokens))):
            dims = step.family.dims(
                GRID,
                batch=2 if step.family.batched_guidance else 1,
                text_length=TEXT_LENGTHS[arguments.family],
                num_kept=kept,
            )
            inputs[kind] = example_inputs(step, dims, seed=1)
        with watched(step.transformer) as ranges:
            run_step(step, inputs["full"])
        places = {"fp32": graphs}
        for quantization in Quantization:
            places[quantization] = _quantized(graphs, quantization, ranges=ranges)
        places["int8, ends too"] = _quantized(graphs, Quantization.INT8, keep_ends=False)
        result["weights_mb"] = {
            name: round((place / f"{Part.STEP.onnx}.data").stat().st_size / 1e6, 1) for name, place in places.items()
        }
        sessions = {name: _session(place) for name, place in places.items()}
        sessions["int8, exact products"] = _session(places[Quantization.INT8], (EXACT_PRODUCTS, "1"))
        others = [quiet_session(graphs / part.onnx) for part in (Part.PROMPT, Part.TIMESTEP)]
        for kind, tensors in inputs.items():
            values = {name: value.numpy() for name, value in tensors.items()}
            result[kind] = _turns(sessions, run_graphs(others, values), arguments.rounds)
    return result


def _session(place: Path, *entries: tuple[str, str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for entry in entries:
        options.add_session_config_entry(*entry)
    return quiet_session(place / Part.STEP.onnx, options=options)


def _quantized(graphs: Path, quantization: Quantization, *, keep_ends: bool = True, ranges: Any = None) -> Path:
    place = graphs.parent / f"{quantization}-{keep_ends}"
    place.mkdir()
    for path in graphs.glob(f"{Part.STEP.onnx}*"):
        shutil.copyfile(path, place / path.name)
    quantize_step(place, quantization, keep_ends=keep_ends, ranges=ranges)
    return place


def _quantizers(model: str) -> dict[str, Any]:
    """Of every quantization the seconds, the peak of memory, and the sizes before and after."""
    result: dict[str, Any] = {"model": model}
    with tempfile.TemporaryDirectory() as folder:
        config = ExportConfig(model=model, out=Path(folder) / model, random_weights=True, targets=(Target.ONNX,))
        bundle = export(config)
        result["fp32_gb"] = _weights_gb(bundle.path)
        for quantization in Quantization:
            place = Path(folder) / quantization
            place.mkdir()
            for path in bundle.path.glob(f"{Part.STEP.onnx}*"):
                shutil.copyfile(path, place / path.name)
            command = [sys.executable, __file__, "one", str(place), quantization]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            result[quantization] = json.loads(run.stdout) if run.returncode == 0 else {"failed": run.returncode}
            shutil.rmtree(place)
    return result


def _quantize_alone(directory: Path, quantization: Quantization) -> dict[str, Any]:
    """Quantize a step; a calibrated one by scales that are not of images, which random weights cannot make."""
    graph = onnx.load(directory / Part.STEP.onnx, load_external_data=False).graph
    ranges = {
        tensor.name.removeprefix("transformer.").removesuffix(".weight.T"): torch.ones(tensor.dims[0])
        for tensor in graph.initializer
        if tensor.name.endswith(".weight.T")
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    quantize_step(directory, quantization, ranges=ranges)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_gb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9, 2),
        "weights_gb": _weights_gb(directory),
    }


def _weights_gb(directory: Path) -> float:
    return round((directory / f"{Part.STEP.onnx}.data").stat().st_size / 1e9, 3)


def _turns(sessions: dict[str, Any], values: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Of every contestant the CPU time of a step, how many times as fast as fp32 it is, and its noise's error."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    noise: dict[str, Any] = {}
    for index in range(-1, rounds):
        for name, session in sessions.items():
            feed = {value.name: values[value.name] for value in session.get_inputs()}
            started = time.process_time()
            results = run_quietly(session, feed)
            elapsed = time.process_time() - started
            names = [value.name for value in session.get_outputs()]
            noise[name] = results[names.index(output_name(NOISE))]
            if index >= 0:
                times[name].append(elapsed)
    return {
        name: {
            "cpu_ms": round(1e3 * statistics.median(found), 1),
            "speedup": round(ratio(times["fp32"], found), 3),
            "noise_error": round(_error(noise[name], noise["fp32"]), 5),
        }
        for name, found in times.items()
    }


def _error(actual: Any, expected: Any) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
