"""What adapters cost a bundle's pipeline under ONNX Runtime: loading, switching, unloading; `make bench-adapters`.

A LoRA of rank 16 on every linear layer of sd3-mini, two of them by turns.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import write_result
from torch import Tensor, nn

from cat_pruning import load_pipeline

RANK = 16


def main() -> None:
    """Measure, print, and write benchmarks/results/adapters.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", default="adapters", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    pipe = load_pipeline(arguments.bundle, "onnxruntime")
    result = measure(pipe, arguments.rounds)
    print(result, write_result(arguments.name, result))  # noqa: T201


def measure(pipe: Any, rounds: int) -> dict[str, Any]:
    """The first load, which makes what adapters lie in, with its memory; then medians over the rounds."""
    transformer = pipe.transformer
    layers = linear_layers(transformer)
    one, two = (adapter(layers, seed) for seed in (1, 2))
    before = resident()
    first = seconds_of(lambda: transformer.load_lora_adapter(one))
    memory = resident() - before
    transformer.unload_lora()
    seconds: dict[str, list[float]] = {name: [] for name in ("load", "switch", "unload")}
    for _ in range(rounds):
        seconds["load"].append(seconds_of(lambda: transformer.load_lora_adapter(one, adapter_name="one")))
        transformer.load_lora_adapter(two, adapter_name="two")
        seconds["switch"].append(seconds_of(lambda: transformer.set_adapters("one")))
        seconds["unload"].append(seconds_of(transformer.unload_lora))
    return {
        "layers": len(layers),
        "rank": RANK,
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "rounds_seconds": seconds,
        "first_load_seconds": first,
        "first_load_megabytes": memory / 1e6,
    }


def linear_layers(transformer: Any) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every linear layer of the diffusers transformer, by name."""
    import diffusers

    cls = getattr(diffusers, transformer.engine.family.transformer_class)
    with torch.device("meta"):
        module = cls(**cls.extract_init_dict(dict(transformer.config))[0])
    linear = {name: each for name, each in module.named_modules() if isinstance(each, nn.Linear)}
    return {name: (each.out_features, each.in_features) for name, each in linear.items()}


def adapter(layers: dict[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    """Random weights of a LoRA, by the names that diffusers' files have."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (outputs, inputs) in layers.items():
        weights[f"transformer.{name}.lora_A.weight"] = 0.05 * torch.randn(RANK, inputs, generator=generator)
        weights[f"transformer.{name}.lora_B.weight"] = 0.05 * torch.randn(outputs, RANK, generator=generator)
    return weights


def seconds_of(run: Callable[[], object]) -> float:
    """Wall time of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def resident() -> int:
    """Bytes of this process's memory."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    main()
