"""What `peers.py` compares: our methods, fewer steps, cache-dit and the caches of diffusers, each as a `Contender`.

Another one is added by a function that returns contenders: how to put it into the pipeline, and how to count its cost.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import hooks
from diffusers.models.cache_utils import CacheMixin
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from torch import nn

from cat_pruning.evaluation.budgets import forecast_at
from cat_pruning.evaluation.solvers import AB2, MULTISTEP, UNIPC, solver_in
from cat_pruning.exporter.macs import ImageMacs
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.schedule import Schedule
from cat_pruning.settings import PruneSettings

STEPS = 28
BUDGETS = (16, 12, 9, 7)  # full steps of STEPS
ATTENTIONS = (
    r"transformer_blocks\.\d+\.attn\d?"  # SD3's attn, and attn1 and attn2 of PixArt, which the default leaves out
)
Install = Callable[[Any], AbstractContextManager[object]]  # into a pipeline, and out of it again


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to make the images of the full run at less cost.

    Attributes:
        name: of the method. budget: in full steps, which it was set to. setting: how.
        install: puts it into the pipeline, anew for every image.
        steps: that the pipeline is asked for.
        counts_blocks: whether its cost is that of the blocks that it calls; or else FLOPs are counted, on one image.
    """

    name: str
    budget: int
    setting: str
    install: Install
    steps: int = STEPS
    counts_blocks: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A contender whose cost follows from a threshold: the greater it is, the less is computed."""

    name: str
    at: Callable[[float, int], Contender]  # threshold, budget


def fewer_steps(pipe: Any) -> list[Contender]:
    """Fewer steps of the pipeline's own scheduler, and of the solvers that can stand in for it."""
    flow = _is_flow(pipe)
    own = "fewer steps, Euler" if flow else "fewer steps, DPM-Solver++"
    solvers: dict[str, Install] = {own: lambda _: nullcontext()}
    for solver in (MULTISTEP, UNIPC, AB2) if flow else (UNIPC,):
        solvers[f"fewer steps, {solver}"] = functools.partial(solver_in, name=solver)
    return [
        Contender(name=name, budget=budget, setting=f"{budget} steps", install=install, steps=budget)
        for name, install in solvers.items()
        for budget in BUDGETS
    ]


def ours(_: Any) -> list[Contender]:
    """CAT as published, at two keep ratios, and the forecast at every budget."""
    contenders = [_cat("CAT", budget, PruneSettings(keep_ratio=ratio)) for budget, ratio in ((16, 0.3), (12, 0.1))]
    return contenders + [_cat("forecast", budget, forecast_settings(budget)) for budget in BUDGETS]


def schedules(files: Sequence[Path]) -> list[Contender]:
    """Schedules that `cat-tune` fitted, at the budgets of their full steps."""
    loaded = [Schedule.load(file) for file in files]
    return [_cat("tuned", len(schedule.full_steps), PruneSettings.tuned(schedule)) for schedule in loaded]


def forecast_settings(budget: int) -> PruneSettings:
    """The preset `forecast` with `budget` full steps."""
    return forecast_at(budget, STEPS, ImageMacs(full=1, pruned=0, prompt=0, timestep=0))


def _cat(name: str, budget: int, settings: PruneSettings) -> Contender:
    setting = f"keep {settings.keep_ratio:g}, {settings.full_steps} full, every {settings.refresh_every}"
    if settings.schedule is not None:
        setting = f"full: {', '.join(map(str, settings.schedule.full_steps))}"
    wrap = functools.partial(CatTransformer.from_model, settings=settings)
    return Contender(name=name, budget=budget, setting=setting, install=transformer_by(wrap), counts_blocks=False)


def cache_dit_peers(pipe: Any) -> list[Tuned]:
    """cache-dit's caches, which are set by a threshold of the first block's change.

    The number of steps at the start that are computed in full is 4, the least that its documents use for 28 steps; 2
    where the blocks of 4 and of a first block in all other steps would be more than the budget.

    Raises:
        ModuleNotFoundError: cache-dit is not installed.
    """
    import cache_dit

    def at(kind: Any, calibrator: Any, name: str, threshold: float, budget: int) -> Contender:
        warm_up = 4 if budget > 8 else 2
        config = kind(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=warm_up,
            residual_diff_threshold=threshold,
            num_inference_steps=STEPS,
            enable_separate_cfg=False,
        )

        def cached(transformer: nn.Module) -> nn.Module:
            # The last block of SD3 returns no text that could be forecast, and nothing reads it.
            options = {} if calibrator is None else {"calibrator_config": calibrator(enable_encoder_calibrator=False)}
            # As its own adapters of the two pipelines have it; a transformer alone it knows of other classes only.
            joint = type(transformer).__name__ == "SD3Transformer2DModel"
            pattern = cache_dit.ForwardPattern.Pattern_1 if joint else cache_dit.ForwardPattern.Pattern_3
            adapter = cache_dit.BlockAdapter(
                transformer=transformer, blocks=transformer.transformer_blocks, forward_pattern=pattern
            )
            cache_dit.enable_cache(adapter, cache_config=copy.deepcopy(config), **options)
            return transformer

        setting = f"threshold {threshold:.4g}, warm-up {warm_up}"
        return Contender(name=name, budget=budget, setting=setting, install=transformer_by(cached))

    kinds = {
        "cache-dit, DBCache": (cache_dit.DBCacheConfig, None),
        "cache-dit, DBCache + Taylor": (cache_dit.DBCacheConfig, cache_dit.TaylorSeerCalibratorConfig),
    }
    if _is_flow(pipe):  # on PixArt's blocks DBPrune of 1.5.3 fails: it calls a method of its own with one argument more
        kinds["cache-dit, DBPrune"] = (cache_dit.DBPruneConfig, None)
    return [Tuned(name=name, at=functools.partial(at, *kind, name)) for name, kind in kinds.items()]


def diffusers_peers(pipe: Any, mag_ratios: list[float]) -> list[Tuned]:
    """The caches of `diffusers.hooks` that are set by a threshold. SeaCache needs the sigma of a flow."""

    def first_block(threshold: float, budget: int) -> Contender:
        config = hooks.FirstBlockCacheConfig(threshold=threshold)
        return _hooked(
            "diffusers, FirstBlockCache", budget, f"threshold {threshold:.4g}", hooks.apply_first_block_cache, config
        )

    def mag(threshold: float, budget: int) -> Contender:
        # At the defaults, a fifth of the steps at the start and every fourth after them, no fewer than 12 are full.
        most, kept = (3, 0.2) if budget > 12 else (6, 0.1)
        config = hooks.MagCacheConfig(
            threshold=threshold,
            max_skip_steps=most,
            retention_ratio=kept,
            num_inference_steps=STEPS,
            mag_ratios=mag_ratios,
        )
        setting = f"threshold {threshold:.4g}, at most {most} skipped, {kept:g} at the start"
        return _hooked("diffusers, MagCache", budget, setting, hooks.apply_mag_cache, config)

    def sea(threshold: float, budget: int) -> Contender:
        most = 2 if budget > 12 else 5  # the default allows no fewer than 11
        config = hooks.SeaCacheConfig(
            threshold=threshold, max_consecutive_cached=most, raw_vision_callback=_rows_as_videos
        )
        setting = f"threshold {threshold:.4g}, at most {most} skipped"
        return _hooked("diffusers, SeaCache", budget, setting, hooks.apply_sea_cache, config)

    tuned = [
        Tuned(name="diffusers, FirstBlockCache", at=first_block),
        Tuned(name="diffusers, MagCache", at=mag),
    ]
    return [*tuned, Tuned(name="diffusers, SeaCache", at=sea)] if _is_flow(pipe) else tuned


def taylor_seers(_: Any) -> list[Contender]:
    """TaylorSeer of diffusers, full (attentions are forecast) and lite (the output is), at every budget of full steps.

    Full computes the MLPs of every step and so costs more than its budget.
    """
    contenders = []
    for lite in (False, True):
        for budget in BUDGETS:
            before, interval = min(
                ((before, interval) for before in range(2, 5) for interval in range(2, STEPS)),
                key=lambda both: (abs(_computed(*both) - budget), both),
            )
            config = hooks.TaylorSeerCacheConfig(
                cache_interval=interval,
                disable_cache_before_step=before,
                max_order=1,
                taylor_factors_dtype=None,
                use_lite_mode=lite,
                cache_identifiers=None if lite else [ATTENTIONS],
            )
            name = f"diffusers, TaylorSeer {'lite' if lite else 'full'}"
            setting = f"{before} at the start, then every {interval}"
            contenders.append(_hooked(name, budget, setting, hooks.apply_taylorseer_cache, config, counts_blocks=lite))
    return contenders


def _computed(before: int, interval: int) -> int:
    """How many steps TaylorSeer computes."""
    return sum(step < before or (step - before - 1) % interval == 0 for step in range(STEPS))


def mag_ratios(pipe: Any, run: Callable[[Install], object]) -> list[float]:
    """MagCache's ratios, which it prints at the end of the image that `run` makes."""
    config = hooks.MagCacheConfig(num_inference_steps=STEPS, calibrate=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(_hooked("", STEPS, "", hooks.apply_mag_cache, config).install)
    line = next(line for line in printed.getvalue().splitlines() if line.startswith("[") and "MagCache" not in line)
    ratios: list[float] = ast.literal_eval(line)
    return ratios


def _is_flow(pipe: Any) -> bool:
    return isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)


def _hooked(
    name: str, budget: int, setting: str, apply: Callable[[Any, Any], None], config: Any, counts_blocks: bool = True
) -> Contender:
    """A contender by a function of `diffusers.hooks`, on classes that know nothing of caches too."""

    def cached(transformer: Any) -> Any:
        _return_text(transformer)
        apply(transformer, config)
        _in_context(transformer)
        return transformer

    return Contender(
        name=name, budget=budget, setting=setting, install=transformer_by(cached), counts_blocks=counts_blocks
    )


def _in_context(transformer: Any) -> None:
    """Tell the hooks what diffusers' pipelines say of each call, which SD3's and PixArt's do not."""
    forward, step = transformer.forward, -1

    def forward_in_context(*arguments: Any, **options: Any) -> Any:
        nonlocal step
        step += 1
        sigma = float(options["timestep"].flatten()[0]) / 1000
        where = {"step_index": step, "num_inference_steps": STEPS, "sigma": sigma}
        with CacheMixin.cache_context(transformer, "image", **where):
            return forward(*arguments, **options)

    transformer.forward = forward_in_context


def _return_text(transformer: Any) -> None:
    """Let SD3's last block return its text as it came instead of None, of which the caches take differences."""
    last = transformer.transformer_blocks[-1]
    if not getattr(last, "context_pre_only", False):
        return
    forward = last.forward

    def with_text(*arguments: Any, **options: Any) -> Any:
        text, image = forward(*arguments, **options)
        return options["encoder_hidden_states"] if text is None else text, image

    last.forward = with_text


def _rows_as_videos(module: Any, arguments: Any, options: dict[str, Any]) -> list[Any]:
    """SeaCache's view of a call: the latents of each row, (C, 1, H, W)."""
    latents = options["hidden_states"] if "hidden_states" in options else arguments[0]
    return [row[:, None] for row in latents]


def transformer_by(change: Callable[[nn.Module], nn.Module]) -> Install:
    """Puts what `change` makes of a copy of the pipeline's transformer in its place."""

    @contextmanager
    def installed(pipe: Any) -> Iterator[None]:
        before = pipe.transformer
        pipe.transformer = change(copy.deepcopy(before))
        try:
            yield
        finally:
            pipe.transformer = before

    return installed
