"""A step kernel by kernel, by torch's profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from timing import REPEATS, Run, synchronize, timed

from gpu.case import Case, shared_case
from gpu.setting import Results, Setting
from gpu.steps import step_contestants

TOP, NAME_LENGTH, REPLAYS = 25, 120, 3
GEMM, ATTENTION, SCATTER = "GEMM", "attention", "scatter and index"
ELEMENTWISE, SORT, OTHER = "elementwise and norm", "sort and scan", "other"
# The first pattern that is found in a kernel's name says its class. Compiled kernels come first, because they are named
# after all that they are fused of; what is named after the CUTLASS types or torch's elementwise kernels that it is
# built on comes before those.
PATTERNS = (
    (r"^triton_(tem|mm|bmm)", GEMM),
    (r"^triton_.*(scatter|gather|index)", SCATTER),
    (r"^triton_", ELEMENTWISE),
    (r"sdpa|flash|fmha|attention", ATTENTION),
    (r"scatter|gather|embedding|indexSelect|index_(elementwise|put|select|copy|add|kernel|fill)|token_rows", SCATTER),
    (r"gemm|gemv|nvjet|cutlass|splitk|xmma|cublas|conv(?!ert)|matmul|::(add|b|baddb)?mm\b|::linear", GEMM),
    (r"sort|scan|topk|cub::", SORT),
    (r"elementwise|norm|CatArray|copy|memcpy|memset|reduce|softmax|gelu|silu|fill", ELEMENTWISE),
    (r"::(add|addcmul|cat|mul|sub|div|clone|mean|pow|where|stack)_?\b", ELEMENTWISE),
)


def kernel_class(name: str) -> str:
    """The class of a kernel, or of an operator on a CPU, by its name: "other" where no pattern knows it."""
    return next((each for pattern, each in PATTERNS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def profile(setting: Setting) -> Results:
    """The kernels of a full and of a pruned step, replayed as CUDA graphs and launched: the longest, sums by class."""
    case = shared_case(setting)
    for captured in (True, False):
        for kind, result in profiles_of(case, captured):
            yield f"{kind}, {'with' if captured else 'without'} CUDA graphs", result


def profiles_of(case: Case, captured: bool, **options: bool) -> Results:
    """A full step and a pruned one, by an engine with these options."""
    device = case.setting.device
    runs = step_contestants(case, captured, **options)
    for kind in ("full", "pruned"):
        step_ms = timed(runs[kind], device, REPEATS)
        kernels = kernel_times(runs[kind], device)
        yield kind, {"step_ms": step_ms, **table(kernels)} if kernels else "torch's profiler saw no kernel"


def kernel_times(run: Run, device: torch.device) -> dict[str, tuple[float, float]]:
    """Calls and milliseconds of every kernel in one run, of `REPLAYS`; of every operator itself on a CPU."""
    from torch.profiler import ProfilerActivity

    is_cuda = device.type == "cuda"
    synchronize(device)
    # On a GPU nothing but its own activities: operators would be counted with the kernels that they launch.
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(REPLAYS):
            run()
        synchronize(device)
    if is_cuda:
        return gpu_kernels(profiler.events() or ())
    averages = profiler.key_averages()
    return {each.key: (each.count / REPLAYS, each.self_cpu_time_total / 1e3 / REPLAYS) for each in averages}


def gpu_kernels(events: Any) -> dict[str, tuple[float, float]]:
    """Of the profiler's events, what ran on the device: calls and milliseconds of one replay by name."""
    calls: dict[str, int] = defaultdict(int)
    microseconds: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            calls[event.name] += 1
            microseconds[event.name] += event.time_range.elapsed_us()
    return {name: (calls[name] / REPLAYS, microseconds[name] / 1e3 / REPLAYS) for name in calls}


def table(kernels: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """The longest kernels and the sums by class, with their shares of all kernels' time."""
    total = sum(ms for _, ms in kernels.values())
    classes: dict[str, float] = defaultdict(float)
    for name, (_, ms) in kernels.items():
        classes[kernel_class(name)] += ms
    longest = sorted(kernels.items(), key=lambda item: item[1][1], reverse=True)[:TOP]
    return {
        "ms": total,
        "kernels": sum(calls for calls, _ in kernels.values()),
        "classes": {
            name: {"ms": ms, "share": ms / total} for name, ms in sorted(classes.items(), key=lambda item: -item[1])
        },
        "longest": [
            {"name": _short(name), "class": kernel_class(name), "calls": calls, "ms": ms, "share": ms / total}
            for name, (calls, ms) in longest
        ],
    }


def _short(name: str) -> str:
    """A kernel's name from both its ends: what is done is at the start or at the end of torch's templates."""
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH // 2]}…{name[-NAME_LENGTH // 2 :]}"
