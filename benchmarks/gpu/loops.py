"""Whole images: full against pruned, the presets, synchronisations, threads, memory."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timing import Run, interleaved, medians, ratio

from cat_pruning.settings import PRESETS, Preset
from gpu.bounds import fewer_steps, loop_bound
from gpu.case import Case, shared_case
from gpu.setting import Results, Setting

WARM_STEPS = 14  # by then the paper's and the presets' schedules have had pruned and full steps enough to be captured


def warm_up(case: Case, *transformers: Any) -> None:
    """Two images, broken off: steps are captured up to the second's eighth."""
    for transformer in transformers:
        for _ in range(2):
            case.sample(transformer, 50, stop_after=WARM_STEPS)


def loops(setting: Setting) -> Results:
    """Whole images, all steps full against the defaults' schedule, through one engine; with and without CUDA graphs.

    Without them, of the shortest schedule only.
    """
    case = shared_case(setting)
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
    for captured in (True, False):
        schedules, rounds = (setting.steps, setting.rounds) if captured else ((min(setting.steps),), 2)
        for num_steps, result in loop_times(case, captured, schedules, min(rounds, setting.rounds)):
            yield f"{num_steps} steps, {'with' if captured else 'without'} CUDA graphs", result
    if setting.device.type == "cuda":
        yield "peak_memory_gb", torch.cuda.max_memory_allocated(setting.device) / 1e9


def loop_times(case: Case, captured: bool, schedules: tuple[int, ...], rounds: int) -> Iterator[tuple[int, Any]]:
    """Full and CAT by the number of steps."""
    from cat_pruning.runtime.transformer import CatTransformer
    from cat_pruning.tools.generate import never_pruned

    setting = case.setting
    engine = case.engine(captured)
    # A transformer each: other settings would make a selector anew, and its steps would be captured anew.
    transformers = {
        name: CatTransformer(engine, settings)
        for name, settings in (("full", never_pruned(setting.prune, max(schedules))), ("CAT", setting.prune))
    }
    warm_up(case, *transformers.values())
    for num_steps in schedules:
        contestants: dict[str, Run] = {
            name: functools.partial(case.sample, each, num_steps) for name, each in transformers.items()
        }
        times = interleaved(contestants, rounds, setting.device, warm_rounds=0)
        speedup, bound = ratio(times["full"], times["CAT"]), loop_bound(setting.model, num_steps, setting.prune)
        yield (
            num_steps,
            {
                "ms": medians(times),
                "rounds_ms": times,
                "speedup": speedup,
                "mac_bound": bound,
                "of_bound": speedup / bound,
            },
        )


def presets(setting: Setting) -> Results:
    """Images by the presets of the settings, by all full steps, and by fewer of them for CAT's MACs; CUDA graphs."""
    from cat_pruning.runtime.transformer import CatTransformer
    from cat_pruning.tools.generate import never_pruned

    case, prune = shared_case(setting), setting.prune
    engine, rounds = case.engine(), min(3, setting.rounds)
    paths = {
        "full": CatTransformer(engine, never_pruned(prune, max(setting.steps))),
        "CAT": CatTransformer(engine, prune),
        "refreshed": CatTransformer(engine, prune.replace(**PRESETS[Preset.REFRESHED])),
        "forecast": CatTransformer(engine, prune.replace(**PRESETS[Preset.FORECAST])),
    }
    warm_up(case, *paths.values())
    for num_steps in setting.steps:
        fewer = fewer_steps(setting.model, num_steps, prune)
        contestants: dict[str, Run] = {
            name: functools.partial(case.sample, each, num_steps) for name, each in paths.items()
        }
        contestants["fewer steps"] = functools.partial(case.sample, paths["full"], fewer)
        times = interleaved(contestants, rounds, setting.device, warm_rounds=0)
        over = {name: ratio(times["full"], each) for name, each in times.items()}
        result = {"fewer_steps": fewer, "ms": medians(times), "rounds_ms": times, "speedup": over}
        yield f"{num_steps} steps", result


def large(setting: Setting) -> Results:
    """FLUX.1-dev, one row, with CUDA graphs: steps by the plain engine and the compiled one, and images by this."""
    from gpu.kernels import matmul_tflops
    from gpu.setting import LARGE_MODEL
    from gpu.steps import attention_backends, step_times

    rounds = min(3, setting.rounds)
    setting = setting.replace(model=LARGE_MODEL, rounds=rounds)
    rate = matmul_tflops(64 if setting.tiny else 8192, setting)
    yield "attention", attention_backends(shared_case(setting))
    for name, compiled in (("plain", False), ("compiled", True)):
        case = shared_case(setting.replace(compiled=compiled))
        yield f"steps, {name}", step_times(case, True, rate)
    for num_steps, result in loop_times(case, True, (min(setting.steps),), min(2, rounds)):
        yield f"{num_steps} steps, compiled", result


def synchronisations(setting: Setting) -> Results:
    """No host synchronisation from an image's second step on; raises where torch sees one.

    The first two images may: capturing a graph does, and that happens up to the second image's eighth step. Beginning
    an image copies the schedule and the prompt.
    """
    from cat_pruning.runtime.transformer import CatTransformer

    case = shared_case(setting)
    for captured in (True, False):
        transformer = CatTransformer(case.engine(captured), setting.prune)
        num_steps = min(setting.steps)
        for _ in range(2):
            case.sample(transformer, num_steps)
        with no_synchronisation(setting.device) as begin:
            case.sample(transformer, num_steps, lambda index, begin=begin: begin() if index == 1 else None)
        yield f"{'with' if captured else 'without'} CUDA graphs", f"none in steps 2 to {num_steps}"


@contextmanager
def no_synchronisation(device: torch.device) -> Iterator[Run]:
    """Yields what to call where synchronising becomes an error, until the end of the block. On a CPU, nothing."""
    is_cuda = device.type == "cuda"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        try:
            yield lambda: torch.cuda.set_sync_debug_mode("error") if is_cuda else None
        finally:
            if is_cuda:
                torch.cuda.set_sync_debug_mode("default")
