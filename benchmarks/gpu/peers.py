"""What else runs the model: diffusers as it is and compiled, beside our steps and images with CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from timing import REPEATS, Run, interleaved, medians, ratio, seconds_of
from torch import Tensor

from gpu.bounds import step_macs
from gpu.case import Case, shared_case
from gpu.loops import warm_up
from gpu.setting import Results, Setting
from gpu.steps import attention_backends, step_contestants

EAGER, WHOLE, REGIONAL = "diffusers", "torch.compile, default", "torch.compile, blocks"
AUTOTUNED = "torch.compile, max-autotune-no-cudagraphs"


def diffusers_eager(setting: Setting) -> Results:
    """The module as diffusers has it, beside our full and pruned step with CUDA graphs."""
    yield from _peer(setting, EAGER)


def compiled(setting: Setting) -> Results:
    """The same module under torch.compile."""
    yield from _peer(setting, WHOLE)


def autotuned(setting: Setting) -> Results:
    """The same module under torch.compile with its search."""
    yield from _peer(setting, AUTOTUNED)


def regional(setting: Setting) -> Results:
    """The same module, its repeated blocks compiled each: `ModelMixin.compile_repeated_blocks`."""
    yield from _peer(setting, REGIONAL)


def peer_loops(setting: Setting) -> Results:
    """Images by diffusers, eager and as it was compiled before in this process, and by our engine, all full and CAT."""
    from cat_pruning.runtime.transformer import CatTransformer
    from cat_pruning.tools.generate import never_pruned

    case, num_steps = shared_case(setting), min(setting.steps)
    engine = case.engine()
    contestants: dict[str, Any] = {name: peer_of(case, name) for name in (EAGER, *_made_of(case))}
    contestants["full"] = CatTransformer(engine, never_pruned(setting.prune, num_steps))
    contestants["CAT"] = CatTransformer(engine, setting.prune)
    with torch.no_grad():
        warm_up(case, *contestants.values())
        runs: dict[str, Run] = {
            name: functools.partial(case.sample, each, num_steps) for name, each in contestants.items()
        }
        times = interleaved(runs, min(3, setting.rounds), setting.device, warm_rounds=0)
    over = {name: ratio(each, times["CAT"]) for name, each in times.items()}
    yield f"{num_steps} steps", {"ms": medians(times), "rounds_ms": times, "over_CAT": over}


def _peer(setting: Setting, name: str) -> Results:
    case = shared_case(setting)
    timestep, rows = torch.tensor(500.0, device=setting.device), case.rows
    peer = peer_of(case, name)

    @torch.no_grad()
    def step() -> Tensor:
        return case.call(peer, rows, timestep)

    yield "seconds_of_the_first_step", seconds_of(step, setting.device)
    ours = step_contestants(case, captured=True)
    times = interleaved(
        {name: step, "full": ours["full"], "pruned": ours["pruned"]}, setting.rounds, setting.device, REPEATS
    )
    yield "attention", attention_backends(case)
    yield (
        name,
        {
            "ms": medians(times),
            "tflops": 2 * step_macs(setting.model)["full"] / medians(times)[name] / 1e9,
            "over_ours": {kind: ratio(times[name], times[kind]) for kind in ("full", "pruned")},
        },
    )


def peer_of(case: Case, name: str) -> Any:
    """A peer over the case's weights; what one compiled in this process is found again."""
    made = _made_of(case)
    if name not in made:
        made[name] = PEERS[name](case.transformer)
    return made[name]


def forget_peers() -> None:
    """Let go of what was compiled, and of its weights."""
    _MADE.clear()


def _made_of(case: Case) -> dict[str, Any]:
    return _MADE.setdefault(id(case.transformer), (case.transformer, {}))[1]  # kept alive, so that its id is its own


_MADE: dict[int, tuple[Any, dict[str, Any]]] = {}


def _regional(module: Any) -> Any:
    """Its blocks compiled, in a copy that shares the weights; as diffusers does it where it knows the blocks."""
    from cat_pruning.families.interception import share_parameters

    peer = share_parameters(module)
    if getattr(peer, "_repeated_blocks", None):
        peer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    else:  # diffusers names none for SD3 and PixArt
        for block in peer.transformer_blocks:
            block.compile(fullgraph=True, dynamic=False)
    return peer


PEERS: dict[str, Callable[[Any], Any]] = {
    EAGER: lambda module: module,
    WHOLE: lambda module: torch.compile(module, mode="default", dynamic=False),
    AUTOTUNED: lambda module: torch.compile(module, mode="max-autotune-no-cudagraphs", dynamic=False),
    REGIONAL: _regional,
}
