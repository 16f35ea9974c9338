"""Does computing some tokens between two full steps ever pay? A trial on the torch engine; `make try-settings`.

    python benchmarks/try_partial.py build/eval/sd3-mini --prompts 16
    python benchmarks/try_partial.py build/eval/sd3-mini-256 --scenes rich --size 256 --batch 4 --name partial-256

One step: on the full run's own latents, the step d steps after the last full one, which is d steps after the one before
it. The relative error of the guided output on the tokens that are computed: `computed` in the keys and values of the
last full step, or in those that the last two extrapolate (`, K/V extrapolated`); beside it what costs nothing, the last
output again, the line, and weights of the last three outputs by least squares over these images; and `blended`, least
squares over those and the computed output. The tokens are random, CAT's first choice, or those where the fitted
forecast is worst, which no policy can know.

Whole images: schedules of as many MACs, all fitted in one way: in the loop, each step that is not full has the weights
of the last three full outputs, and of a partial step's since then, that lead nearest to the recorded latents after it.
Full steps are searched by the recordings. Partial steps are where they lessen the squared error of the output most, on
the recordings, of all steps that are not full, and as many as cost no less than the full steps that they stand for.
`blended`: on the tokens that it computes, a partial step's output is a combination of what it computed and of what the
others read, which no schedule can say. `tokens free` counts a partial step's cost by its image tokens alone, though the
text's rows are computed with them: a bound for models whose images have many more tokens than text.
Written to results/NAME.json; of `--only` some parts, the others stay there as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads sleep between steps

import torch
from machine import RESULTS, write_result
from token_runs import STEPS, TERMS, Partial, Run, Trajectory, Weights, beyond_last, combined, fitted, trajectory
from token_steps import Images
from torch import Tensor

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.evaluation.intervals import mean_interval
from cat_pruning.evaluation.sweep import costs
from cat_pruning.models.prompts import Prompt, load_prompts, tuning_prompts
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.settings import Policy, PruneSettings
from cat_pruning.tools.generate import GenerateConfig
from cat_pruning.tuning.recordings import Recordings
from cat_pruning.tuning.scheduler_matrix import scheduler_matrix
from cat_pruning.tuning.search import search

GUIDANCE, TEXT_TOKENS = 3.0, 24
DISTANCES, TARGETS, KEEP = (1, 2, 3, 6), (13, 17, 21, 25), (0.06, 0.3)
WORST = "worst"
EXTRAPOLATED = ", K/V extrapolated"


class Trial:
    """The trial on one bundle.

    Args:
        bundle: of sd3-mini or sd3-mini-256.
        prompts: images.
        scenes: their kind, scenes or rich.
        size: of a side, in pixels.
        batch: images at once, whose keys and values of every step are kept; and as many are fitted to.
        policies: of the schedules with partial steps.
    """

    def __init__(self, bundle: Bundle, prompts: int, scenes: str, size: int, batch: int, policies: list[str]) -> None:
        self._pipe = load_pipeline(bundle.path, "torch", settings=PruneSettings())
        self._pipe.set_progress_bar_config(disable=True)
        scheduler = type(self._pipe.scheduler).from_config(self._pipe.scheduler.config)
        scheduler.set_timesteps(STEPS)
        self._timesteps, self._matrix = scheduler.timesteps.tolist(), scheduler_matrix(scheduler)
        self._prompts = load_prompts(f"{scenes}:{prompts}")
        self._scenes, self._size, self._batch = scenes, size, batch
        self._variants = [variant for variant in VARIANTS if variant[1] in policies]
        self._macs = {
            keep: costs(bundle, size, size, PruneSettings(keep_ratio=keep), True, "").all for keep in (*KEEP, 0.1)
        }

    def cost(self, keep_ratio: float) -> float:
        """Of a partial step, in full ones."""
        return self._macs[keep_ratio].pruned / self._macs[keep_ratio].full

    @property
    def partial_costs(self) -> dict[str, float]:
        """By the share of the tokens."""
        return {f"{keep:g}": self.cost(keep) for keep in (*KEEP, 0.1)}

    def one_step(self) -> dict[str, Any]:
        """By distance, share and choice of the tokens: the errors of each way to have a step."""
        errors: dict[str, dict[str, list[Tensor]]] = {}
        for images in self._batches(self._prompts, 0):
            run = trajectory(images)
            for distance in DISTANCES:
                for target in TARGETS:
                    for name, found in _one_step(images, run, target, distance):
                        for way, error in found.items():
                            errors.setdefault(name, {}).setdefault(way, []).append(error)
        batches = -(-len(self._prompts) // self._batch)
        rows = {name: {way: _mean(values, batches) for way, values in ways.items()} for name, ways in errors.items()}
        for name, ways in rows.items():
            for way, row in ways.items():
                _say(f"{name:26s} {way:32s}", row)
        return rows

    def whole_images(self, budget: int) -> dict[str, Any]:
        """By schedule of the cost of `budget` full steps the error of the final latents, and the cost."""
        images = next(self._batches(tuning_prompts(f"{self._scenes}:{self._batch}"), 1_000_000))
        recorded = trajectory(images)
        recordings = Recordings(start=images.start, parts=torch.stack(recorded.parts, 1), final=recorded.states[-1])
        batches = list(self._batches(self._prompts, 0))
        truths = [trajectory(each, keep=False).states[-1] for each in batches]
        choices = search(recordings.grams().mean(0), self._matrix, (budget, BASES[budget]), width=4)
        rows = {}
        for name, full, partial, cost in self._schedules(budget, choices, images, recorded):
            weights: dict[int, Weights] = {}
            Run(images, full, partial, weights, recorded.states).final()
            errors: list[float] = []
            for each, truth in zip(batches, truths, strict=True):
                off = Run(each, full, partial, weights).final() - truth
                errors += (off.flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).tolist()
            rows[name] = {"cost": cost, "full": full, "partial": partial.steps} | _interval(errors)
            _say(f"{name:70s} cost {cost:5.2f}", rows[name])
        return rows

    def _schedules(
        self, budget: int, choices: dict[int, tuple[int, ...]], images: Images, run: Trajectory
    ) -> Iterator[tuple[str, tuple[int, ...], Partial, float]]:
        base = BASES[budget]
        for count in (budget, base):
            yield f"{count} full", choices[count], Partial(), float(count)
        full = choices[base]
        for keep, policy, extrapolated, blended, free in self._variants:
            count = min(math.ceil((budget - base) / (keep if free else self.cost(keep))), STEPS - base)
            partial = Partial(keep_ratio=keep, extrapolated=extrapolated, policy=policy, blended=blended)
            gains = _gains(images, run, full, partial)
            steps = tuple(sorted(sorted(gains, key=lambda step: -gains[step])[:count]))
            ways = [EXTRAPOLATED, *([", blended"] if blended else []), *([", tokens free"] if free else [])]
            name = f"{base} full, {count} of {keep:g} {policy}{''.join(ways if extrapolated else ways[1:])}"
            yield name, full, dataclasses.replace(partial, steps=steps), base + count * self.cost(keep)

    def _batches(self, prompts: Sequence[Prompt], seed: int) -> Iterator[Images]:
        for first in range(0, len(prompts), self._batch):
            config = GenerateConfig(
                prompts=tuple(prompt.text for prompt in prompts[first : first + self._batch]),
                height=self._size,
                width=self._size,
                steps=STEPS,
                guidance_scale=GUIDANCE,
                seed=seed + first,
                text_arguments={"max_sequence_length": TEXT_TOKENS},
            )
            yield Images(self._pipe, config, self._timesteps)


BASES = {9: 7, 6: 4}  # full steps of all forecasts, and of a schedule that spends the rest on partial steps
# (share of the tokens, their policy, keys and values extrapolated, blended, image tokens alone counted)
VARIANTS = (
    (0.1, Policy.RANDOM, False, False, False),
    (0.1, Policy.RANDOM, True, False, False),
    (0.3, Policy.RANDOM, False, False, False),
    (0.3, Policy.RANDOM, True, False, False),
    (0.1, Policy.CAT, False, False, False),
    (0.3, Policy.CAT, False, False, False),
    (0.3, Policy.CAT, True, False, False),
    (0.3, Policy.CAT, False, True, False),
    (0.3, Policy.RANDOM, True, True, False),
    (0.3, Policy.RANDOM, True, True, True),
)


PARTS = ("one step", *(f"as {budget}" for budget in BASES))


def _one_step(images: Images, run: Trajectory, target: int, distance: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    last, before = target - distance, target - 2 * distance
    reads = [run.parts[step] for step in range(last, -1, -distance)[:TERMS]]
    truth, beyond = run.output(target), beyond_last(images, before, last, target)
    free = {
        "repeated": run.output(last),
        "line": (1 + beyond) * run.output(last) - beyond * run.output(before),
        "fitted": combined(reads, fitted(reads, truth)),
    }
    noises, latents = [run.noises[before], run.noises[last]], run.states[target]
    for keep in KEEP:
        for policy in (Policy.RANDOM, Policy.CAT, WORST):
            if policy == WORST:
                tokens = images.worst(keep, truth - free["fitted"])
            else:
                tokens = images.chosen(Policy(policy), keep, latents, noises, target)
            mask = images.mask(tokens)
            found = dict(free)
            for what, older in (("", None), (EXTRAPOLATED, run.caches[before])):
                images.set_caches(run.caches[last], older, beyond)
                parts = images.some(target, latents, tokens)[1]
                both = [*reads, parts]
                found[f"computed{what}"] = parts.sum(1)
                found[f"blended{what}"] = combined(both, fitted(both, truth, ~mask))
            errors = {way: _error(value, truth, mask) for way, value in found.items()}
            yield f"{distance} apart, {keep:g} {policy}", errors


def _gains(images: Images, run: Trajectory, full: tuple[int, ...], partial: Partial) -> dict[int, float]:
    """By step, what a partial one takes away of the squared error of the forecast, on the full run's latents."""
    gains = {}
    for step in sorted(set(range(STEPS)) - set(full)):
        earlier = [each for each in full if each < step]
        last, before = earlier[-1], earlier[-2] if len(earlier) > 1 else earlier[-1]
        reads, truth = [run.parts[each] for each in earlier[-TERMS:]], run.output(step)
        noises, latents = [run.noises[before], run.noises[last]], run.states[step]
        tokens = images.chosen(partial.policy, partial.keep_ratio, latents, noises, step)
        extrapolates = partial.extrapolated and before != last
        beyond = beyond_last(images, before, last, step) if extrapolates else 0.0
        images.set_caches(run.caches[last], run.caches[before] if extrapolates else None, beyond)
        parts, mask = images.some(step, latents, tokens)[1], images.mask(tokens)
        both = [*reads, parts]
        computed = combined(both, fitted(both, truth, ~mask)) if partial.blended else parts.sum(1)
        forecast = combined(reads, fitted(reads, truth))
        length = images.sigmas[step + 1] - images.sigmas[step]
        gain = _error(forecast, truth, mask).square() - _error(computed, truth, mask).square()
        gains[step] = length**2 * float(gain.sum())
    return gains


def _error(value: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Of each image, relative, where the mask is: (R,)."""
    where = mask.float()
    error: Tensor = ((value - truth) * where).flatten(1).norm(dim=1) / (truth * where).flatten(1).norm(dim=1)
    return error


def _mean(values: list[Tensor], batches: int) -> dict[str, Any]:
    """Over the targets first, which come one after another within a batch."""
    each = len(values) // batches
    return _interval(
        [float(x) for batch in range(batches) for x in torch.stack(values[batch * each : (batch + 1) * each]).mean(0)]
    )


def _interval(values: Sequence[float]) -> dict[str, Any]:
    interval = mean_interval(values, range(len(values)))
    assert interval is not None
    return {"error": interval.mean, "half_width": interval.half_width, "prompts": interval.prompts}


def _say(name: str, row: dict[str, Any]) -> None:
    print(f"{name}  {row['error']:.4f} ± {row['half_width']:.4f}", flush=True)  # noqa: T201


def main() -> None:
    """Run the parts of the trial, print their rows, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=16, help="scenes (default: 16)")
    parser.add_argument("--scenes", choices=("scenes", "rich"), default="scenes", help="rich: sd3-mini-256's")
    parser.add_argument("--size", type=int, default=128, help="of a side, in pixels (default: 128)")
    parser.add_argument("--batch", type=int, default=8, help="images at once, and those fitted to (default: 8)")
    policies = sorted({str(variant[1]) for variant in VARIANTS})
    parser.add_argument("--policy", action="append", choices=policies, help="of whole images (default: all)")
    parser.add_argument("--name", default="partial", help="of the file in benchmarks/results (default: partial)")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; repeatable (default: all)")
    arguments = parser.parse_args()
    bundle, path = Bundle.open(arguments.bundle), RESULTS / f"{arguments.name}.json"
    trial = Trial(
        bundle, arguments.prompts, arguments.scenes, arguments.size, arguments.batch, arguments.policy or policies
    )
    for part in arguments.only or PARTS:
        with torch.no_grad():
            rows = trial.one_step() if part == PARTS[0] else trial.whole_images(int(part.split()[-1]))
        known = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
        write_result(arguments.name, {"partial_step_costs": trial.partial_costs, "parts": {**known, part: rows}})


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
