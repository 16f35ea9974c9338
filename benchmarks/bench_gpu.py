"""What pruning is worth on a GPU: steps, whole images, peers, the parts of a step; `make bench-gpu`.

The published architectures with random weights in bf16, made on the device, at 1024x1024 with guidance: two rows. Text
encoders and autoencoder are left out but in `pipeline`; prompts are random embeddings, and the scheduler is the
pipeline's own. What is compared with each other runs in turn within every round, timed by CUDA events; medians and
ratios are over the rounds.

Every measurement (`MEASUREMENTS`, in the package `gpu`) is a generator of named results, written as they come, so that
one that is stopped leaves what it had, and one that fails does not keep the next from running. Those of one model share
its weights within the process. `--device cpu --tiny` runs all of it at sizes for a machine without a GPU, to test the
code.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import fast, float8, kernels, loops, memory, peers, pipeline, profiles, steps
from gpu.bounds import RESULTS
from gpu.case import forget_shared
from gpu.setting import LARGE_MODEL, LOOP_STEPS, MODELS, Results, Setting

from cat_pruning.settings import PruneSettings

MEASUREMENTS: dict[str, Callable[[Setting], Results]] = {
    "matmul": kernels.matmul_rate,
    "selection": steps.select_alone,
    "kernels": kernels.token_kernels,
    "gemms": kernels.gemms,
    "attention": kernels.attention,
    "caches": kernels.caches,
    "steps": steps.steps,
    "profile": profiles.profile,
    "kept": steps.kept,
    "sizes": steps.sizes,
    "loops": loops.loops,
    "presets": loops.presets,
    "synchronisations": loops.synchronisations,
    "memory": memory.memory,
    "threads": memory.threads,
    "fast": fast.fast,
    "float8": float8.float8,
    "diffusers": peers.diffusers_eager,
    "regional": peers.regional,
    "compile": peers.compiled,
    "peer-loops": peers.peer_loops,
    "autotune": peers.autotuned,
    "pipeline": pipeline.pipeline,
    "flux": loops.large,
}
# Or with their own.
WITHOUT_MODEL = ("matmul", "selection", "kernels", "gemms", "attention", "caches", "pipeline", "flux")


def main(argv: list[str] | None = None) -> int:
    """Measure, print each result as it comes, and write them all; 2 where there is no GPU and none was asked for."""
    arguments = _parser().parse_args(argv)
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("bench_gpu needs an NVIDIA GPU, and torch has no CUDA device here\n")
        return 2
    collected: dict[str, Any] = {}
    failures = []
    for name in arguments.measurement or MEASUREMENTS:
        for model in MODELS[:1] if name in WITHOUT_MODEL else arguments.model or MODELS:
            place = collected.setdefault(name, {})
            if name not in WITHOUT_MODEL:
                place = place.setdefault(model, {})
            failure = _measure(name, _setting(arguments, model), place, lambda: _write(arguments.out, collected))
            failures += [failure] if failure else []
            gc.collect()  # sessions and their graphs
            if arguments.device.type == "cuda":
                torch.cuda.empty_cache()
    peers.forget_peers()
    forget_shared()
    for failure in failures:
        sys.stderr.write(f"{failure}\n")
    return int(bool(failures))


def _measure(name: str, setting: Setting, place: dict[str, Any], write: Callable[[], None]) -> str:
    """Fill `place` as far as it goes; why it went no further, in a line, or nothing."""
    try:
        for title, result in MEASUREMENTS[name](setting):
            place[title] = result
            write()
            print(f"{name}, {setting.model}: {title}: {json.dumps(_without_rounds(result))}", flush=True)  # noqa: T201
    except Exception as error:  # noqa: BLE001  # what comes after it is worth having
        traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        place["failed"] = reason
        write()
        return f"{name}, {setting.model}: {reason}"
    return ""


def _setting(arguments: argparse.Namespace, model: str) -> Setting:
    return Setting(
        model,
        arguments.device,
        arguments.tiny,
        arguments.rounds,
        tuple(arguments.steps or LOOP_STEPS),
        PruneSettings(num_clusters=5) if arguments.tiny else PruneSettings(),
        compiled=arguments.compiled,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "measurement", nargs="*", type=_measurement, help=f"of {', '.join(MEASUREMENTS)} (default: all)"
    )
    models = (*MODELS, LARGE_MODEL)
    parser.add_argument("--model", action="append", choices=models, help=f"repeatable (default: {', '.join(MODELS)})")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--tiny", action="store_true", help="sizes for a machine without a GPU; numbers mean nothing")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, action="append", help="of a loop; repeatable (default: 28, 50)")
    parser.add_argument("--compiled", action="store_true", help="our engine is the compiled one (`fast` has both)")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench-gpu.json")
    return parser


def _measurement(name: str) -> str:
    if name not in MEASUREMENTS:
        raise argparse.ArgumentTypeError(f"{name}: expected some of {', '.join(MEASUREMENTS)}")
    return name


def _write(out: Path, collected: dict[str, Any]) -> None:
    from cat_pruning.files import write_whole

    write_whole(out, json.dumps(collected, indent=2) + "\n")


def _without_rounds(result: Any) -> Any:
    if isinstance(result, dict):
        return {name: _without_rounds(value) for name, value in result.items() if name != "rounds_ms"}
    return round(result, 4) if isinstance(result, float) else result


if __name__ == "__main__":
    sys.exit(main())
