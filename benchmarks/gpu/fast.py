"""The torch engine's two ways beside each other: the module as it is, and with its blocks compiled."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from timing import REPEATS, Run, interleaved, medians, ratio, seconds_of
from torch import Tensor

from gpu.case import TIMESTEPS, Case, shared_case
from gpu.loops import warm_up
from gpu.profiles import profiles_of
from gpu.setting import Results, Setting
from gpu.steps import step_contestants

Contestants = Mapping[str, tuple[Case, dict[str, bool]]]  # the model, and keywords of `Case.engine`

ENGINES: dict[str, dict[str, bool]] = {
    "plain": {"compiled": False},
    "compiled": {"compiled": True},
    "compiled, fused QKV": {"compiled": True, "fused": True},
}


def fast(setting: Setting) -> Results:
    """Steps and images by each engine, the first use's seconds, and how far each is from the module in fp32."""
    case = shared_case(setting)
    yield from contest({name: (case, options) for name, options in ENGINES.items()}, in_fp32(case))
    # Last: the profiler may leave launches slower.
    for kind, result in profiles_of(case, captured=True, **ENGINES["compiled"]):
        yield f"profile of the compiled {kind} step", result


def contest(contestants: Contestants, reference: Case) -> Results:
    """Steps and images by each, the first use's seconds, and how far each is from the `reference`, which is not timed.

    Speedups of images are over the first contestant's full steps.
    """
    setting = reference.setting
    exact = _outputs(reference, {"compiled": False, "captured": False})[1]
    for name, (case, options) in contestants.items():
        seconds, outputs = _outputs(case, options)
        yield f"{name}, seconds of the first steps", seconds
        yield f"{name}, error", {kind: _error(outputs[kind], exact[kind]) for kind in exact}
    del exact, outputs
    yield "steps", _steps(contestants, setting)
    yield f"{min(setting.steps)} steps", _images(contestants, setting)


def in_fp32(case: Case) -> Case:
    """The same weights, prompt and latents, computed in fp32."""
    exact = copy.copy(case)
    exact.transformer = copy.deepcopy(case.transformer).float()
    return exact


def _outputs(case: Case, options: dict[str, bool]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Seconds of a full step and a pruned one where nothing is compiled yet, and their outputs."""
    from cat_pruning.runtime.image import every_token

    setting, rows = case.setting, case.rows.to(next(case.transformer.parameters()).dtype)
    outputs: dict[str, Tensor] = {}
    session = case.begun(case.engine(**options))
    first, *_, at = (case.timestep(each) for each in TIMESTEPS)
    every = every_token(rows, setting.num_tokens)
    # Tokens evenly apart, the same for every engine.
    count = setting.prune.num_kept(setting.num_tokens)
    some = every[:, torch.arange(count, device=rows.device) * setting.num_tokens // count].contiguous()

    def full() -> None:
        outputs["full"] = session.step(rows, first, every)

    def pruned() -> None:
        outputs["pruned"] = session.step(rows * 0.9, at, some)

    seconds = {run.__name__: seconds_of(run, setting.device) for run in (full, pruned)}
    return seconds, outputs


def _error(output: Tensor, exact: Tensor) -> float:
    """The norm of the difference, relative to the exact output's."""
    return float((output.float() - exact).norm() / exact.norm())


def _steps(contestants: Contestants, setting: Setting) -> dict[str, Any]:
    runs: dict[str, Run] = {}
    for name, (case, options) in contestants.items():
        made = step_contestants(case, captured=True, **options)
        runs |= {f"{name}, {kind}": made[kind] for kind in ("full", "pruned")}
    times = interleaved(runs, setting.rounds, setting.device, REPEATS)
    speedups = {name: ratio(times[f"{name}, full"], times[f"{name}, pruned"]) for name in contestants}
    return {"ms": medians(times), "rounds_ms": times, "speedup": speedups}


def _images(contestants: Contestants, setting: Setting) -> dict[str, Any]:
    from cat_pruning.runtime.transformer import CatTransformer
    from cat_pruning.tools.generate import never_pruned

    num_steps = min(setting.steps)
    runs: dict[str, Run] = {}
    for name, (case, options) in contestants.items():
        engine = case.engine(**options)
        for kind, settings in (("full", never_pruned(setting.prune, num_steps)), ("CAT", setting.prune)):
            transformer = CatTransformer(engine, settings)
            warm_up(case, transformer)
            runs[f"{name}, {kind}"] = functools.partial(case.sample, transformer, num_steps)
    times = interleaved(runs, min(3, setting.rounds), setting.device, warm_rounds=0)
    first = times[f"{next(iter(contestants))}, full"]
    return {
        "ms": medians(times),
        "rounds_ms": times,
        "speedup": {name: ratio(first, each) for name, each in times.items()},
    }
