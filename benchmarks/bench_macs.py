"""MACs of every published model at 1024 x 1024, full and pruned, in both conventions; `make bench-macs`.

Counted from the graphs of the whole architecture, traced without weights. One prompt, with the guidance of its
pipeline: two rows for SD3 and PixArt, one for FLUX. `linear` counts linear and convolution layers only, as the paper;
`all` counts attention scores too. A full image is the untouched model on every step; a pruned one has its prompt's
graph once, its timestep's on every step, and full and pruned steps as the default schedule has them.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from machine import write_result
from rich.console import Console
from rich.table import Table

from cat_pruning.checkpoints.published import Published, published_models
from cat_pruning.checkpoints.random_weights import hollow_transformer
from cat_pruning.dtype import DType
from cat_pruning.exporter.macs import ImageMacs, Macs, count_graph_macs
from cat_pruning.exporter.split import split_graph
from cat_pruning.exporter.step_graph import trace_step
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.plugins import onnx_ops
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import SYMBOLIC, Part

GRID = (64, 64)  # tokens of 1024 x 1024 pixels
STEPS = (4, 28, 50)


def main() -> None:
    """Count, print, and write benchmarks/results/macs.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(published_models()), help="repeatable (default: all)")
    names = parser.parse_args().model or list(published_models())
    result = {name: _count(published_models()[name]) for name in names}
    Console().print(_table(result))
    Console().print(f"written to {write_result('macs', result)}")


def _count(published: Published) -> dict[str, Any]:
    started, settings = time.perf_counter(), PruneSettings()
    transformer: Any = hollow_transformer(published.transformer_class, published.transformer, DType.BF16)
    family = family_of(transformer)
    shapes = family.step_shapes(SYMBOLIC)
    graphs = split_graph(trace_step(StepModule(transformer, family)), shapes, family.part_of)
    for graph in graphs.values():
        onnx_ops.attach_functions(graph.model)  # whose shapes are inferred from their bodies
    num_tokens = GRID[0] * GRID[1]

    def count(part: Part, kept: int) -> Macs:
        dims = family.dims(
            GRID,
            batch=2 if family.batched_guidance else 1,
            text_length=published.text_length,
            num_kept=kept,
        )
        inputs = {name: dims.named(spec.shape) for name, spec in graphs[part].inputs.items()}
        return count_graph_macs(graphs[part].model.clone(), inputs)

    kept = settings.num_kept(num_tokens)
    full, pruned = count(Part.STEP, num_tokens), count(Part.STEP, kept)
    prompt, timestep = count(Part.PROMPT, kept), count(Part.TIMESTEP, kept)
    images = {
        "linear": ImageMacs(full.linear, pruned.linear, prompt.linear, timestep.linear),
        "all": ImageMacs(full.total, pruned.total, prompt.total, timestep.total),
    }
    return {
        "parameters": transformer.num_parameters(),
        "seconds": round(time.perf_counter() - started, 1),
        "step": {
            kind: {"full": image.full, "pruned": image.pruned, "prompt": image.prompt, "timestep": image.timestep}
            for kind, image in images.items()
        },
        "images": {
            str(steps): {
                kind: {"full": image.unpruned(steps), "pruned": image.pruned_image(steps, settings)}
                for kind, image in images.items()
            }
            for steps in STEPS
        },
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(title="TMACs at 1024 x 1024: full → pruned, and their ratio")
    table.add_column("model")
    for kind in ("linear", "all"):
        table.add_column(f"step, {kind}", justify="right")
    columns = [(steps, kind) for steps in STEPS for kind in ("linear", "all")]
    for steps, kind in columns:
        table.add_column(f"{steps} steps, {kind}", justify="right")
    for name, counted in result.items():
        pairs = [counted["step"][kind] for kind in ("linear", "all")]
        pairs += [counted["images"][str(steps)][kind] for steps, kind in columns]
        table.add_row(name, *(_cell(pair["full"], pair["pruned"]) for pair in pairs))
    return table


def _cell(full: int, pruned: int) -> str:
    return f"{full / 1e12:.2f} → {pruned / 1e12:.2f}\n{full / pruned:.3f}×"


if __name__ == "__main__":
    main()
