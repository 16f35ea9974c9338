"""A pruned step against a full one, next to the bound that its MACs set; `make bench`.

The size is one where attention and MLP dominate: 6 layers, width 512, 1024 image tokens, 333 text tokens, two rows
(one prompt with guidance). All contestants run in turn within every round, and medians and ratios are over the rounds,
because machines are shared: diffusers' own module, then each step engine's full and pruned step, then the selection.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import write_result
from rich.console import Console
from rich.table import Table

from cat_pruning.dtype import DType
from cat_pruning.exporter.checkpoint import random_transformer
from cat_pruning.exporter.families import family_named
from cat_pruning.exporter.interception import StepModule
from cat_pruning.exporter.macs import count_macs
from cat_pruning.exporter.step_graph import example_inputs, export_step_graph
from cat_pruning.runtime import kmeans, selection
from cat_pruning.runtime.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.runtime.step_engine import StepEngine
from cat_pruning.runtime.torch_engine import TorchStepEngine
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import StepDims

CONFIG = {
    "sample_size": 64,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 8,
    "joint_attention_dim": 512,
    "caption_projection_dim": 512,
    "pooled_projection_dim": 512,
    "pos_embed_max_size": 64,
    "dual_attention_layers": (),
}
GRID = (32, 32)
TEXT_LENGTH = 333
BATCH = 2


def main() -> None:
    """Measure, print, and write benchmarks/results/step.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--name", default="step", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    settings = PruneSettings(keep_ratio=arguments.keep_ratio)
    family = family_named("sd3")
    transformer: Any = random_transformer(family.transformer_class, CONFIG, DType.FP32, seed=0)
    full_dims, pruned_dims = (_dims(kept) for kept in (GRID[0] * GRID[1], settings.num_kept(GRID[0] * GRID[1])))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        step = StepModule(transformer, family)
        export_step_graph(step, path)
        full, pruned = (count_macs(path, family.step_shapes(CONFIG, dims)) for dims in (full_dims, pruned_dims))
        engines: list[StepEngine] = [
            OnnxRuntimeStepEngine(path, family, transformer.config, torch.float32),
            TorchStepEngine(transformer),
        ]
        contestants = _contestants(step, transformer, engines, full_dims, pruned_dims, settings)
        times = _interleaved(contestants, arguments.rounds)
    _report(times, full.total / pruned.total, arguments.name, arguments.rounds)


def _dims(num_kept: int) -> StepDims:
    height, width = (side * CONFIG["patch_size"] for side in GRID)  # type: ignore[operator]
    return StepDims.of(
        batch=BATCH,
        latent_height=height,
        latent_width=width,
        patch_size=2,
        text_length=TEXT_LENGTH,
        num_kept=num_kept,
    )


def _contestants(
    step: StepModule,
    transformer: Any,
    engines: list[StepEngine],
    full_dims: StepDims,
    pruned_dims: StepDims,
    settings: PruneSettings,
) -> dict[str, Callable[[], object]]:
    inputs = example_inputs(step, full_dims)
    model_inputs = {name: inputs[name] for name in step.family.input_names}
    every = torch.arange(int(full_dims.num_tokens), dtype=torch.int32).expand(BATCH, -1).contiguous()
    some = example_inputs(step, pruned_dims, seed=1)["keep_indices"].sort(dim=1).values

    def diffusers_step() -> object:
        with torch.no_grad():
            return transformer(**model_inputs, return_dict=False)

    contestants: dict[str, Callable[[], object]] = {"diffusers": diffusers_step}
    for engine in engines:
        session = engine.session()
        contestants[f"{engine.name} full"] = lambda session=session: session.step(model_inputs, every)  # type: ignore[misc]
        contestants[f"{engine.name} pruned"] = lambda session=session: session.step(model_inputs, some)  # type: ignore[misc]
    contestants["selection"] = _selection(settings, int(pruned_dims.num_kept))
    return contestants


def _selection(settings: PruneSettings, num_kept: int) -> Callable[[], object]:
    """Algorithm 2 as a pruned step runs it, for both rows: later selection and the count."""
    num_tokens, channels = GRID[0] * GRID[1], 64
    noise = torch.randn(BATCH, num_tokens, channels, generator=torch.Generator().manual_seed(0))
    features = selection.cluster_features(noise, kmeans.position_encoding(*GRID, channels), settings.noise_scale)
    initial = kmeans.initial_tokens(*GRID, settings.num_clusters)
    cluster_ids = kmeans.kmeans(features, initial, settings.kmeans_iterations)
    count = torch.zeros(BATCH, num_tokens)

    def select() -> object:
        kept = selection.next_selection(noise, cluster_ids, count, num_kept, settings)
        return selection.count_selection(count, kept, settings.staleness_decay)

    return select


def _interleaved(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every contestant in every round; two rounds before them are not counted."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_index in range(-2, rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if round_index >= 0:
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def _report(times: dict[str, list[float]], bound: float, name: str, rounds: int) -> None:
    medians = {contestant: statistics.median(values) for contestant, values in times.items()}
    result: dict[str, Any] = {
        "config": {**CONFIG, "tokens": GRID[0] * GRID[1], "text_length": TEXT_LENGTH, "batch": BATCH},
        "rounds": rounds,
        "median_ms": medians,
        "mac_bound": bound,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    table = Table(title=f"one step, medians of {rounds} interleaved rounds; bound by MACs {bound:.3f}×")
    for column in ("", "full", "pruned", "speedup", "of the bound", "selection"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("diffusers", f"{medians['diffusers']:.1f} ms")
    for engine in ("onnxruntime", "torch"):
        full, pruned = times[f"{engine} full"], times[f"{engine} pruned"]
        ratio = statistics.median(a / b for a, b in zip(full, pruned, strict=True))  # within a round
        share = medians["selection"] / (medians[f"{engine} pruned"] + medians["selection"])
        result[engine] = {"speedup": ratio, "of_bound": ratio / bound, "selection_share": share}
        table.add_row(
            engine,
            f"{medians[f'{engine} full']:.1f} ms",
            f"{medians[f'{engine} pruned']:.1f} ms",
            f"{ratio:.3f}×",
            f"{ratio / bound:.1%}",
            f"{share:.2%}",
        )
    Console().print(table)
    Console().print(f"selection {medians['selection']:.2f} ms, peak memory {result['peak_rss_gb']:.2f} GB")
    Console().print(f"written to {write_result(name, result)}")


if __name__ == "__main__":
    main()
