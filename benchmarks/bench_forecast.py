"""What a step that computes nothing costs beside its few operations on the outputs; `make bench-forecast`.

sd3-mini as its pipeline calls it, two rows for one prompt with guidance, fp32. A forecast reads two outputs, so what it
cannot do without are a product, a sum and a conversion: `combine`. The contestants run in turn, an image each, in every
round; the medians are over all forecasts of all rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from machine import write_result
from rich.console import Console
from rich.table import Table

from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.exporter.step_graph import export_step_graph
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.models import miniatures
from cat_pruning.runtime.outputs import combine
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.runtime.whole import WholeTransformer
from cat_pruning.schedule import Schedule
from cat_pruning.settings import PruneSettings

STEPS = 60
TEXT_LENGTH = 48
LEVELS = torch.linspace(1000.0, 10.0, STEPS)
SCHEDULE = Schedule.of(
    STEPS,
    [0, 1],
    {number: {0: -0.5, 1: 1.5} for number in range(2, STEPS)},
    timesteps=tuple(LEVELS.tolist()),
)


def main() -> None:
    """Measure, print, and write benchmarks/results/forecast.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    module = SD3Transformer2DModel.from_pretrained(miniatures()["sd3-mini"] / "transformer").eval()
    settings = PruneSettings.tuned(SCHEDULE)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        family = family_of(module)
        export_step_graph(StepModule(module, family), directory)
        engine = OnnxRuntimeStepEngine(directory, family, torch.float32)
        contestants: dict[str, Any] = {
            "CatTransformer, torch": CatTransformer.from_model(module, settings),
            "CatTransformer, ONNX Runtime": CatTransformer(engine, settings),
            "WholeTransformer": WholeTransformer.around(module, settings),
        }
        call = _call(module.config)
        times: dict[str, list[float]] = {name: [] for name in ("combine", *contestants)}
        for warm in [True, *[False] * arguments.rounds]:
            measured = {"combine": _combine(call), **{name: _image(each, call) for name, each in contestants.items()}}
            if not warm:
                for name, microseconds in measured.items():
                    times[name] += microseconds
    _report(times, arguments.rounds)


def _call(config: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    size = config["sample_size"]
    return {
        "hidden_states": randn(1, config["in_channels"], size, size).repeat(2, 1, 1, 1),
        "encoder_hidden_states": randn(2, TEXT_LENGTH, config["joint_attention_dim"]),
        "pooled_projections": randn(2, config["pooled_projection_dim"]),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _image(transformer: Any, call: dict[str, Any]) -> list[float]:
    """Microseconds of every forecast of an image."""
    levels = LEVELS.clone()  # a new schedule, as every call of a pipeline sets one
    return _each(lambda step: transformer(**call, timestep=levels[step].expand(2)))


def _combine(call: dict[str, Any]) -> list[float]:
    outputs = [call["hidden_states"].clone(), call["hidden_states"].clone()]
    return _each(lambda step: combine(outputs, [-0.5, 1.5]))


def _each(run: Callable[[int], object]) -> list[float]:
    microseconds = []
    with torch.no_grad():
        for step in range(STEPS):
            started = time.perf_counter()
            run(step)
            microseconds.append((time.perf_counter() - started) * 1e6)
    return microseconds[2:]


def _report(times: dict[str, list[float]], rounds: int) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    table = Table(title=f"a step that computes nothing, medians of {len(times['combine'])}")
    for column in ("", "µs", "over combine, µs"):
        table.add_column(column, justify="right" if column else "left")
    for name, median in medians.items():
        table.add_row(name, f"{median:.0f}", f"{median - medians['combine']:.0f}")
    Console().print(table)
    Console().print(f"written to {write_result('forecast', {'rounds': rounds, 'median_us': medians})}")


if __name__ == "__main__":
    main()
