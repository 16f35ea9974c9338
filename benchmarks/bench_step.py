"""A pruned step against a full one, next to the bound that its MACs set; `make bench`.

Sizes where attention and MLP dominate: 6 layers, width 512, 1024 image tokens, fp32; two rows (one prompt with
guidance), one for FLUX. All contestants run in turn within every round, and medians and ratios are over the rounds,
because machines are shared: diffusers' own module, each step engine's full and pruned step, the same steps from one
graph that is not split into prompt, timestep and step, then the selection and the small graphs.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from machine import write_result
from rich.console import Console
from rich.table import Table
from timing import interleaved, medians
from torch import Tensor

from cat_pruning import step_io
from cat_pruning.checkpoints.random_weights import random_transformer
from cat_pruning.dtype import DType
from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.exporter.macs import count_macs
from cat_pruning.exporter.split import Graph
from cat_pruning.exporter.step_graph import example_inputs, export_step_graph, trace_step
from cat_pruning.families import family_class_named, family_of
from cat_pruning.families.family import Family
from cat_pruning.families.interception import StepModule
from cat_pruning.plugins import onnx_ops
from cat_pruning.runtime.selection import kmeans, selection
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import KEEP_INDICES, LATENTS, TIMESTEP, Part, StepDims

CONFIGS: dict[str, dict[str, Any]] = {
    "sd3": {
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
    },
    "pixart": {
        "sample_size": 64,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 6,
        "attention_head_dim": 64,
        "num_attention_heads": 8,
        "cross_attention_dim": 512,
        "caption_channels": 512,
        "norm_type": "ada_norm_single",
        "use_additional_conditions": False,
    },
    "flux": {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 64,
        "num_attention_heads": 8,
        "joint_attention_dim": 512,
        "pooled_projection_dim": 512,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 24, 24),
    },
}
TEXT_LENGTHS = {"sd3": 333, "pixart": 300, "flux": 333}
GRID = (32, 32)
STEPS = 28


def main() -> None:
    """Measure, print, and write benchmarks/results/step-FAMILY.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(CONFIGS), default="sd3")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--name", help="of the file in benchmarks/results (default: step-FAMILY)")
    arguments = parser.parse_args()
    settings = PruneSettings(keep_ratio=arguments.keep_ratio)
    if not settings.keep_ratio:
        parser.error("--keep-ratio 0: a step that computes nothing has no time")
    config = CONFIGS[arguments.family]
    transformer_class = family_class_named(arguments.family).transformer_class
    transformer: Any = random_transformer(transformer_class, config, DType.FP32, seed=0)
    family = family_of(transformer)  # with what an old config leaves out filled in
    num_tokens = GRID[0] * GRID[1]
    full_dims, pruned_dims = (
        family.dims(
            GRID,
            batch=2 if family.batched_guidance else 1,
            text_length=TEXT_LENGTHS[arguments.family],
            num_kept=kept,
        )
        for kept in (num_tokens, settings.num_kept(num_tokens))
    )
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        step = StepModule(transformer, family)
        graphs = export_step_graph(step, directory)
        bound = _mac_bound(directory, graphs[Part.STEP], full_dims, pruned_dims)
        engine = OnnxRuntimeStepEngine(directory, family, torch.float32)
        contestants = {
            **_diffusers(transformer, family, full_dims),
            **_engines(step, [engine, TorchStepEngine(transformer)], full_dims, pruned_dims),
            **_unsplit(step, directory, full_dims, pruned_dims),
            **_small_graphs(engine, step, full_dims),
            "selection": _selection(settings, int(pruned_dims.num_kept), int(pruned_dims.batch)),
        }
        times = interleaved(contestants, arguments.rounds, torch.device("cpu"))
        weights = {part.value: (directory / f"{part.onnx}.data").stat().st_size for part in Part}
    result = {
        "family": arguments.family,
        "config": {**config, "tokens": num_tokens, "text_length": TEXT_LENGTHS[arguments.family]},
        "rows": full_dims.batch,
        "weights_bytes": weights,
        "states_bytes_per_step": _states_bytes(graphs[Part.TIMESTEP], full_dims),
        "states_bytes_per_image": _states_bytes(graphs[Part.PROMPT], full_dims),
    }
    _report(result, times, bound, arguments.name or f"step-{arguments.family}", arguments.rounds)


def _mac_bound(directory: Path, graph: Graph, full_dims: StepDims, pruned_dims: StepDims) -> float:
    full, pruned = (
        count_macs(directory / Part.STEP.onnx, {name: dims.named(spec.shape) for name, spec in graph.inputs.items()})
        for dims in (full_dims, pruned_dims)
    )
    return full.total / pruned.total


def _states_bytes(graph: Graph, dims: StepDims) -> int:
    shapes = [dims.named(spec.shape) for spec in graph.outputs.values()]
    return sum(4 * torch.Size([int(dim) for dim in shape]).numel() for shape in shapes)


def _diffusers(transformer: Any, family: Family, dims: StepDims) -> dict[str, Callable[[], object]]:
    """The untouched module, called as its pipeline does."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for name, shape in family.input_shapes(dims).items() if name != "layer_gates"}
    arguments = {
        name: family.example_input(name, [int(dim) for dim in shape], generator)
        for name, shape in shapes.items()
        if name in (LATENTS, TIMESTEP, *family.argument_names())
    }
    if "img_ids" in family.argument_names():
        rows, columns = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
        arguments["img_ids"] = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
        arguments["txt_ids"] = torch.zeros(int(dims.text_length), 3)

    def run() -> object:
        with torch.no_grad():
            return transformer(**arguments, return_dict=False)

    return {"diffusers": run}


def _engines(
    step: StepModule, engines: list[StepEngine], full_dims: StepDims, pruned_dims: StepDims
) -> dict[str, Callable[[], object]]:
    inputs, every, some = _inputs(step, full_dims, pruned_dims)
    own = (LATENTS, TIMESTEP, KEEP_INDICES)
    conditioning = {name: tensor for name, tensor in inputs.items() if name not in own}
    contestants: dict[str, Callable[[], object]] = {}
    for engine in engines:
        session = engine.session()
        session.begin(full_dims, conditioning, [500.0])
        for kind, indices in (("full", every), ("pruned", some)):
            contestants[f"{engine.name} {kind}"] = (
                lambda session=session, indices=indices: session.step(inputs[LATENTS], 500.0, indices)  # type: ignore[misc]
            )
    return contestants


def _unsplit(
    step: StepModule, directory: Path, full_dims: StepDims, pruned_dims: StepDims
) -> dict[str, Callable[[], object]]:
    """The whole step as one graph under ONNX Runtime, its caches bound in place as the engine's are."""
    import onnxruntime  # after the package, which switches its telemetry off

    model = trace_step(step)
    onnx_ops.attach_functions(model)
    path = directory / "whole.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    inputs, every, some = _inputs(step, full_dims, pruned_dims)
    num_caches = len(step.family.caches())
    for name in step_io.cache_names(num_caches):
        value = onnxruntime.OrtValue.ortvalue_from_numpy(inputs[name].numpy())
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(step_io.output_name(name), value)
    binding.bind_output(step_io.output_name(step_io.NOISE), "cpu")
    known = {value.name for value in session.get_inputs()} - set(step_io.cache_names(num_caches))

    def run(indices: Tensor) -> object:
        for name, tensor in {**inputs, KEEP_INDICES: indices}.items():
            if name in known:
                binding.bind_cpu_input(name, tensor.numpy())
        return session.run_with_iobinding(binding)

    return {"whole graph full": lambda: run(every), "whole graph pruned": lambda: run(some)}


def _small_graphs(engine: OnnxRuntimeStepEngine, step: StepModule, dims: StepDims) -> dict[str, Callable[[], object]]:
    inputs = example_inputs(step, dims)

    def timestep(steps: int) -> object:
        rows = {name: inputs[name] for name in engine.inputs[Part.TIMESTEP]}
        repeated = {
            name: tensor.repeat(steps, *[1] * (tensor.dim() - 1)) if tensor.shape[0] == dims.batch else tensor
            for name, tensor in rows.items()
        }
        return engine.run(Part.TIMESTEP, repeated)

    return {
        "prompt.onnx": lambda: engine.run(Part.PROMPT, inputs),
        f"timestep.onnx, {STEPS} steps": lambda: timestep(STEPS),
        "timestep.onnx, 1 step": lambda: timestep(1),
    }


def _inputs(step: StepModule, full_dims: StepDims, pruned_dims: StepDims) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs of a step, the indices of all tokens, and those of a pruned step."""
    inputs = example_inputs(step, full_dims)
    every = torch.arange(int(full_dims.num_tokens), dtype=torch.int32).expand(int(full_dims.batch), -1).contiguous()
    some = example_inputs(step, pruned_dims, seed=1)[KEEP_INDICES].sort(dim=1).values
    return inputs, every, some


def _selection(settings: PruneSettings, num_kept: int, rows: int) -> Callable[[], object]:
    """Algorithm 2 as a pruned step runs it, for every row: later selection and the count."""
    num_tokens, channels = GRID[0] * GRID[1], 64
    noise = torch.randn(rows, num_tokens, channels, generator=torch.Generator().manual_seed(0))
    features = selection.cluster_features(noise, kmeans.position_encoding(*GRID, channels), settings.noise_scale)
    initial = kmeans.initial_tokens(*GRID, settings.num_clusters)
    cluster_ids = kmeans.kmeans(features, initial, settings.kmeans_iterations)
    count = torch.zeros(rows, num_tokens)

    def select() -> object:
        kept = selection.next_selection(noise, cluster_ids, count, num_kept, settings)
        return selection.count_selection(count, kept, settings.staleness_decay)

    return select


def _report(result: dict[str, Any], times: dict[str, list[float]], bound: float, name: str, rounds: int) -> None:
    by_contestant = medians(times)
    result |= {
        "rounds": rounds,
        "median_ms": by_contestant,
        "mac_bound": bound,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    table = Table(title=f"one step, medians of {rounds} interleaved rounds; bound by MACs {bound:.3f}×")
    for column in ("", "full", "pruned", "speedup", "of the bound", "selection"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("diffusers", f"{by_contestant['diffusers']:.1f} ms")
    for engine in ("onnxruntime", "torch", "whole graph"):
        full, pruned = times[f"{engine} full"], times[f"{engine} pruned"]
        ratio = _ratio(full, pruned)
        share = by_contestant["selection"] / (by_contestant[f"{engine} pruned"] + by_contestant["selection"])
        result[engine] = {"speedup": ratio, "of_bound": ratio / bound, "selection_share": share}
        table.add_row(
            engine,
            f"{by_contestant[f'{engine} full']:.1f} ms",
            f"{by_contestant[f'{engine} pruned']:.1f} ms",
            f"{ratio:.3f}×",
            f"{ratio / bound:.1%}",
            f"{share:.2%}",
        )
    result["whole_over_split"] = {
        kind: _ratio(times[f"whole graph {kind}"], times[f"onnxruntime {kind}"]) for kind in ("full", "pruned")
    }
    Console().print(table)
    Console().print(
        ", ".join(f"{contestant} {ms:.2f} ms" for contestant, ms in medians.items() if "." in contestant)
        + f", selection {by_contestant['selection']:.2f} ms\n"
        f"whole graph over split step: {result['whole_over_split']['full']:.3f} (full), "
        f"{result['whole_over_split']['pruned']:.3f} (pruned); peak memory {result['peak_rss_gb']:.2f} GB"
    )
    Console().print(f"written to {write_result(name, result)}")


def _ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


if __name__ == "__main__":
    main()
