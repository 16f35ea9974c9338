"""Our methods beside cache-dit, diffusers' caches and fewer steps, in one run on a miniature; `make peers`.

    python benchmarks/peers.py sd3-mini --prompts 16        # needs: pip install --no-deps cache-dit==1.5.3

All run in torch, in diffusers' own pipeline, an image at a time, so that a cache decides for each image. What has a
threshold is set, on other scenes, to cost as nearly as it can 16, 12, 9 and 7 full steps of 28. Cost is in full
steps: the blocks that were called over those of a full step; FLOPs where blocks are called in part. For every scene all
run in turn. Printed and written to results/peers-MODEL.json, with 95 % intervals over scenes: the final latents'
relative error to the full run and the PSNR, the change of the coverage, and an image's CPU-seconds over the full run's.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads sleep between steps
os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # or it describes itself for every image

import contenders
import torch
from contenders import BUDGETS, STEPS, Contender, Install, Tuned
from machine import write_result
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cat_pruning.evaluation.intervals import Interval, mean_interval
from cat_pruning.evaluation.metrics import Metric, Metrics, Sample
from cat_pruning.evaluation.worker import last_latents
from cat_pruning.models import miniatures
from cat_pruning.models.prompts import Prompt, load_prompts

HALVINGS = 7  # of a threshold's range
LEAST, MOST = 1e-4, 8.0  # thresholds
# What the pipelines are called with: at these guidances the miniatures paint best.
CALLS: dict[str, dict[str, Any]] = {
    "sd3-mini": {"guidance_scale": 3.0, "max_sequence_length": 24},
    "pixart-mini": {"guidance_scale": 4.5, "use_resolution_binning": False, "clean_caption": False},
}


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of the CPU's fused attention, of which torch counts the GPU's alone; by shapes."""
    return sdpa_flop_count(query, key, value)  # type: ignore[no-any-return]


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One image of one contender. blocks: calls of transformer blocks, in full steps. seconds: of the CPU."""

    sample: Sample
    blocks: float
    seconds: float


class Arena:
    """A miniature's pipeline, in which contenders make images."""

    def __init__(self, model: str) -> None:
        from diffusers import DiffusionPipeline

        absent = {"text_encoder_3": None, "tokenizer_3": None} if model == "sd3-mini" else {}
        self.pipe = DiffusionPipeline.from_pretrained(miniatures()[model], **absent)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = CALLS[model]
        self.num_blocks = len(self.pipe.transformer.transformer_blocks)
        self._one_and_full: tuple[int, int] | None = None  # FLOPs of images of one step and of all

    def run(self, install: Install, prompt: Prompt, seed: int, steps: int = STEPS) -> Result:
        """The image of a prompt by a contender that is put in for it alone."""
        with install(self.pipe), _block_calls(self.pipe.transformer) as calls, last_latents(self.pipe) as latents:
            started = time.process_time()
            images = self.pipe(
                prompt.text,
                height=128,
                width=128,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
                **self.call,
            ).images
            seconds = time.process_time() - started
        sample = Sample(images=images, latents=latents[-1].float())
        return Result(sample=sample, blocks=len(calls) / self.num_blocks, seconds=seconds)

    def flops(self, install: Install, prompt: Prompt, steps: int = STEPS) -> int:
        """Floating-point operations of a whole image."""
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            self.run(install, prompt, seed=0, steps=steps)
        return counter.get_total_flops()

    def full_steps(self, contender: Contender, prompt: Prompt) -> float:
        """What a contender costs in full steps, by FLOPs; what an image costs besides its steps is left out."""
        if self._one_and_full is None:
            self._one_and_full = self.flops(_as_it_is, prompt, 1), self.flops(_as_it_is, prompt, STEPS)
        one, full = self._one_and_full
        step = (full - one) / (STEPS - 1)
        return 1 + (self.flops(contender.install, prompt, contender.steps) - one) / step


@contextmanager
def _block_calls(transformer: Any) -> Iterator[list[None]]:
    """One entry for each block of a diffusers transformer that is computed meanwhile: every block has one MLP."""
    calls: list[None] = []
    blocks = getattr(transformer, "transformer_blocks", ())
    handles = [block.ff.register_forward_hook(lambda *_: calls.append(None)) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _as_it_is(_: Any) -> Any:
    return nullcontext()


def tuned(arena: Arena, peer: Tuned, budget: int, prompts: list[Prompt]) -> Contender:
    """The peer at the threshold whose cost is nearest to the budget, by halving the range in logarithms."""
    low, high = math.log(LEAST), math.log(MOST)
    tried: list[tuple[float, Contender]] = []
    for _ in range(HALVINGS):
        contender = peer.at(math.exp((low + high) / 2), budget)
        cost = statistics.fmean(
            arena.run(contender.install, prompt, seed).blocks for seed, prompt in enumerate(prompts)
        )
        tried.append((abs(cost - budget), contender))
        low, high = ((low + high) / 2, high) if cost > budget else (low, (low + high) / 2)
    return min(tried, key=lambda each: each[0])[1]


def line_up(arena: Arena, prompts: list[Prompt], schedules: list[Path], peers: bool) -> list[Contender]:
    """All contenders, set to their budgets on `prompts`."""
    found = [*contenders.fewer_steps(arena.pipe), *contenders.ours(arena.pipe), *contenders.schedules(schedules)]
    if not peers:
        return found
    ratios = contenders.mag_ratios(arena.pipe, lambda install: arena.run(install, prompts[0], seed=0))
    with_threshold = [*contenders.cache_dit_peers(arena.pipe), *contenders.diffusers_peers(arena.pipe, ratios)]
    found += contenders.taylor_seers(arena.pipe)
    return found + [tuned(arena, peer, budget, prompts) for peer in with_threshold for budget in BUDGETS]


class Scores:
    """The scores of every contender on every scene."""

    def __init__(self, arena: Arena, prompts: list[Prompt], compared: list[Contender]) -> None:
        self.arena, self.prompts, self.compared = arena, prompts, compared
        self._metrics = Metrics([Metric.LATENTS, Metric.PSNR, Metric.COVERAGE], prompts)
        self._values: list[dict[str, list[float | None]]] = [{} for _ in compared]
        self._full: dict[str, list[float | None]] = {}

    def add(self, index: int) -> None:
        """One scene, by all in turn."""
        prompt = self.prompts[index]
        full = self.arena.run(_as_it_is, prompt, index)
        coverage = self._scored(full.sample, None, prompt)["coverage"] or 0.0
        _append(self._full, coverage=coverage, seconds=full.seconds)
        for contender, values in zip(self.compared, self._values, strict=True):
            result = self.arena.run(contender.install, prompt, index, contender.steps)
            scores = self._scored(result.sample, full.sample, prompt)
            scores["coverage"] = (scores["coverage"] or 0.0) - coverage
            _append(values, **scores, blocks=result.blocks, time=result.seconds / full.seconds)

    def _scored(self, sample: Sample, full: Sample | None, prompt: Prompt) -> dict[str, float | None]:
        return self._metrics.score(sample, full, [prompt])[0]

    def summary(self) -> dict[str, Any]:
        """The means and intervals of every contender."""
        rows = []
        for contender, values in zip(self.compared, self._values, strict=True):
            row = {"name": contender.name, "budget": contender.budget, "setting": contender.setting}
            if not contender.counts_blocks:
                values = {**values, "blocks": [self.arena.full_steps(contender, self.prompts[0])] * len(self.prompts)}
            rows.append(row | {name: _interval(scores) for name, scores in values.items()})
        full = {name: _interval(scores) for name, scores in self._full.items()}
        return {"prompts": len(self.prompts), "steps": STEPS, "full": full, "rows": rows}


def _append(values: dict[str, list[float | None]], **more: float | None) -> None:
    for name, value in more.items():
        values.setdefault(name, []).append(value)


def _interval(values: list[float | None]) -> dict[str, float] | None:
    interval: Interval | None = mean_interval(values, list(range(len(values))))
    if interval is None:
        return None
    return {"mean": interval.mean, "half_width": interval.half_width if len(values) > 1 else 0.0}


def _print(summary: dict[str, Any]) -> None:
    names = {"latents_error": 4, "psnr_db": 1, "coverage": 4, "time": 2}
    table = Table(title=f"{summary['prompts']} scenes, against {STEPS} full steps")
    for column in ("budget", "method", "setting", "full steps", "latents' error", "PSNR (dB)", "coverage", "CPU time"):
        table.add_column(column, justify="left" if column in ("method", "setting") else "right")
    for row in sorted(summary["rows"], key=lambda row: -row["budget"]):
        cells = [
            "–" if row[name] is None else f"{row[name]['mean']:.{digits}f} ± {row[name]['half_width']:.{digits}f}"
            for name, digits in names.items()
        ]
        table.add_row(str(row["budget"]), row["name"], row["setting"], f"{row['blocks']['mean']:.1f}", *cells)
    Console(width=200).print(table)


def main() -> None:
    """Compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(CALLS), nargs="?", default="sd3-mini")
    parser.add_argument("--prompts", type=int, default=16, help="scenes (default: 16)")
    parser.add_argument("--tune-on", type=int, default=4, help="scenes that thresholds are set on (default: 4)")
    parser.add_argument("--schedule", type=Path, action="append", default=[], help="of cat-tune; may be repeated")
    parser.add_argument("--without-peers", action="store_true", help="our methods and fewer steps alone")
    arguments = parser.parse_args()
    arena = Arena(arguments.model)
    prompts = load_prompts(f"scenes:{arguments.prompts + arguments.tune_on}")
    try:
        compared = line_up(arena, prompts[arguments.prompts :], arguments.schedule, not arguments.without_peers)
    except ModuleNotFoundError as error:
        parser.exit(
            2, f"peers.py: {error.name} is not installed; pip install --no-deps cache-dit==1.5.3, or --without-peers\n"
        )
    scores = Scores(arena, prompts[: arguments.prompts], compared)
    for index in range(arguments.prompts):
        scores.add(index)
    summary = scores.summary() | {"cache_dit": None if arguments.without_peers else version("cache-dit")}
    _print(summary)
    print(f"written to {write_result(f'peers-{arguments.model}', summary)}")  # noqa: T201


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
