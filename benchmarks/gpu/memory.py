"""Memory and threads: what an image needs besides the weights, and two images at once."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from timing import seconds_of, synchronize
from torch import Tensor

from gpu.case import Case, shared_case
from gpu.loops import warm_up
from gpu.setting import Results, Setting


def memory(setting: Setting) -> Results:
    """Gigabytes: the weights, the caches, and the peak of an image by diffusers, by all full steps and by CAT.

    The peaks are of two images, broken off once everything has been captured; of a CPU there are none.
    """
    from cat_pruning.runtime.transformer import CatTransformer
    from cat_pruning.tools.generate import never_pruned

    case = shared_case(setting)
    yield "weights_gb", _bytes(case.transformer.parameters()) / 1e9
    yield "caches_gb", _cache_bytes(case) / 1e9
    if setting.device.type != "cuda":
        return
    contestants: dict[str, Any] = {
        "diffusers": lambda: case.transformer,
        "full": lambda: CatTransformer(case.engine(), never_pruned(setting.prune, 50)),
        "CAT": lambda: CatTransformer(case.engine(), setting.prune),
        "CAT, without CUDA graphs": lambda: CatTransformer(case.engine(captured=False), setting.prune),
    }
    for name, make in contestants.items():
        yield name, _peak(case, make)


def _peak(case: Case, make: Any) -> dict[str, float]:
    device = case.setting.device
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before, reserved_before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    with torch.no_grad():
        warm_up(case, make())
    synchronize(device)
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {
        "peak_gb": peak / 1e9,
        "besides_gb": (peak - before) / 1e9,  # what was there before: the weights
        "reserved_gb": reserved / 1e9,
        "reserved_besides_gb": (reserved - reserved_before) / 1e9,
    }


def _cache_bytes(case: Case) -> int:
    size = case.setting.dtype.itemsize
    shapes = [spec.shape(case.dims) for spec in case.family.caches()]
    return sum(2 * size * int(batch) * int(rows) * int(width) for batch, rows, width in shapes)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def threads(setting: Setting) -> Results:
    """Two threads, each with its own image and stream, on one transformer: images a second, and how they differ.

    Each thread's images are made alone first, which captures its steps.
    """
    from cat_pruning.runtime.transformer import CatTransformer

    case, num_steps, rounds = shared_case(setting), min(setting.steps), min(3, setting.rounds)
    transformer, latents = CatTransformer(case.engine(), setting.prune), [case.other_latents(seed) for seed in (1, 2)]
    synchronize(setting.device)
    pools = [_pool(setting.device) for _ in latents]

    def image(each: int) -> Any:
        return pools[each].submit(_image, case, transformer, num_steps, latents[each])

    try:
        for _ in range(2):  # captures, and then the images alone
            alone = [image(each).result() for each in range(2)]
        one, two = [], []
        for _ in range(rounds):
            one.append(seconds_of(lambda: [image(0).result() for _ in range(2)], setting.device))
            two.append(seconds_of(lambda: [each.result() for each in [image(0), image(1)]], setting.device))
        together = [each.result() for each in [image(0), image(1)]]
    finally:
        for pool in pools:
            pool.shutdown()
    rates = {"one thread": 2 / sorted(one)[rounds // 2], "two threads": 2 / sorted(two)[rounds // 2]}
    yield "images_per_second", rates
    yield "gain", rates["two threads"] / rates["one thread"]
    spread = float(alone[0].float().std())
    differences = [float((a - b).float().abs().max()) for a, b in zip(alone, together, strict=True)]
    yield "largest_difference_from_alone", max(differences) / spread


def _pool(device: torch.device) -> ThreadPoolExecutor:
    """One thread with a stream of its own."""

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))

    return ThreadPoolExecutor(1, initializer=begin)


def _image(case: Case, transformer: Any, num_steps: int, latents: Tensor) -> Tensor:
    image = case.sample(transformer, num_steps, latents=latents)
    if image.device.type == "cuda":
        torch.cuda.current_stream(image.device).synchronize()
    return image
