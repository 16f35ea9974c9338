"""The torch engine's two ways beside each other: the module as it is, and with its blocks compiled."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gpu.case import TIMESTEPS, Case, shared_case
from gpu.loops import warm_up
from gpu.profiles import profiles_of
from gpu.setting import Results, Run, Setting, can_compile
from gpu.steps import step_contestants
from gpu.timing import REPEATS, interleaved, medians, ratio, seconds_of

# Keywords of `TorchStepEngine`.
ENGINES: dict[str, dict[str, bool]] = {"plain": {"compiled": False}, "compiled": {"compiled": True}}


def fast(setting: Setting) -> Results:
    """Steps and images by both engines, the first use's seconds, and how far their outputs are from each other."""
    case = shared_case(setting)
    engines = ENGINES if can_compile() else {"plain": {}}
    if len(engines) == 1:
        yield "compiled", "not available: this version's TorchStepEngine does not take compiled"
    outputs = {}
    for name, options in engines.items():
        seconds, outputs[name] = _first_use(case, options)
        yield f"{name}, seconds of the first steps", seconds
    if len(outputs) == 2:
        plain, other = outputs.values()
        yield "differences", {kind: _difference(plain[kind], other[kind]) for kind in plain}
        del plain, other
    del outputs
    yield "steps", _steps(case, engines)
    yield f"{min(setting.steps)} steps", _images(case, engines, min(setting.steps))
    if "compiled" in engines:  # last: the profiler may leave launches slower
        for kind, result in profiles_of(case, captured=True, **engines["compiled"]):
            yield f"profile of the compiled {kind} step", result


def _first_use(case: Case, options: dict[str, bool]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Seconds of a full step and a pruned one where nothing is compiled yet, and their outputs."""
    from cat_pruning.runtime.image import every_token

    setting, rows = case.setting, case.rows
    outputs: dict[str, Tensor] = {}
    session = case.begun(case.engine(**options))
    first, *_, at = (case.timestep(each) for each in TIMESTEPS)
    every = every_token(rows, setting.num_tokens)
    # Every so-manieth token, the same for both engines.
    count = setting.prune.num_kept(setting.num_tokens)
    some = every[:, torch.arange(count, device=rows.device) * setting.num_tokens // count].contiguous()

    def full() -> None:
        outputs["full"] = session.step(rows, first, every)

    def pruned() -> None:
        outputs["pruned"] = session.step(rows * 0.9, at, some)

    seconds = {run.__name__: seconds_of(run, setting.device) for run in (full, pruned)}
    return seconds, outputs


def _difference(plain: Tensor, other: Tensor) -> dict[str, float]:
    """Of two outputs: the largest, and the root of the mean square, both in units of the first one's spread."""
    difference, spread = (other - plain).float(), plain.float().std()
    return {
        "largest_of_spread": float(difference.abs().max() / spread),
        "rms_of_spread": float(difference.square().mean().sqrt() / spread),
    }


def _steps(case: Case, engines: dict[str, dict[str, bool]]) -> dict[str, Any]:
    runs: dict[str, Run] = {}
    for name, options in engines.items():
        made = step_contestants(case, captured=True, **options)
        runs |= {f"{name}, {kind}": made[kind] for kind in ("full", "pruned")}
    times = interleaved(runs, case.setting.rounds, case.setting.device, REPEATS)
    speedups = {name: ratio(times[f"{name}, full"], times[f"{name}, pruned"]) for name in engines}
    return {"ms": medians(times), "rounds_ms": times, "speedup": speedups}


def _images(case: Case, engines: dict[str, dict[str, bool]], num_steps: int) -> dict[str, Any]:
    from cat_pruning.runtime.generate import never_pruned
    from cat_pruning.runtime.transformer import CatTransformer

    prune = case.setting.prune
    transformers = {
        f"{name}, {kind}": CatTransformer(engine, settings)
        for name, engine in {name: case.engine(**options) for name, options in engines.items()}.items()
        for kind, settings in (("full", never_pruned(prune, num_steps)), ("CAT", prune))
    }
    warm_up(case, *transformers.values())
    runs: dict[str, Run] = {
        name: functools.partial(case.sample, each, num_steps) for name, each in transformers.items()
    }
    times = interleaved(runs, min(3, case.setting.rounds), case.setting.device, warm_rounds=0)
    over = {name: ratio(times["plain, full"], each) for name, each in times.items()}
    return {"ms": medians(times), "rounds_ms": times, "speedup": over}
