"""Does computing some tokens between two full steps ever pay? A trial on the torch engine; `make try-settings`.

    python benchmarks/try_partial.py build/eval/sd3-mini --prompts 16

One step: on the full run's own latents, the step d steps after the last full one, which is d steps after the one before
it. The relative error of the guided output on the tokens that are computed: `computed` in the keys and values of the
last full step, or in those that the last two extrapolate (`, K/V extrapolated`); beside it what costs nothing, the last
output again, the line, and weights of the last three outputs by least squares over these images; and `blended`, least
squares over those and the computed output. The tokens are random, CAT's first choice, or those where the fitted
forecast is worst, which no policy can know.

Whole images: schedules of as many MACs, all fitted in one way: in the loop, each step that is not full has the weights
of the last three full outputs, and of a partial step's since then, that lead nearest to the recorded latents after it.
Full steps are searched by the recordings. Partial steps are where they lessen the squared error of the output most, on
the recordings, of all steps that are not full. `tokens free` counts a partial step's cost by its image tokens alone,
though the text's rows are computed with them: a bound for models whose images have many more tokens than text.
Written to results/partial.json.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads sleep between steps

import torch
from machine import write_result
from token_steps import Caches, Images
from torch import Tensor

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.evaluation.intervals import mean_interval
from cat_pruning.evaluation.prompts import Prompt, load_prompts, tuning_prompts
from cat_pruning.evaluation.sweep import costs
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.settings import Policy, PruneSettings
from cat_pruning.tools.generate import GenerateConfig
from cat_pruning.tuning.recordings import Recordings
from cat_pruning.tuning.scheduler_matrix import scheduler_matrix
from cat_pruning.tuning.search import search

STEPS, BATCH, GUIDANCE, SIZE, TEXT_TOKENS = 28, 8, 3.0, 128, 24
DISTANCES, TARGETS, KEEP = (1, 2, 3, 6), (13, 17, 21, 25), (0.06, 0.3)
TERMS, RIDGE = 3, 1e-7
WORST = "worst"
EXTRAPOLATED = ", K/V extrapolated"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """A full run: the latents before each step and after the last, and of each step its rows, parts and caches."""

    states: list[Tensor]
    noises: list[Tensor]
    parts: list[Tensor]
    caches: list[Caches]

    def output(self, step: int) -> Tensor:
        """The guided output, (R, C, H, W)."""
        return self.parts[step].sum(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """Steps that compute some tokens.

    Attributes:
        steps: their numbers.
        keep_ratio: of the tokens.
        extrapolated: whether keys and values are.
        policy: of the tokens.
    """

    steps: tuple[int, ...] = ()
    keep_ratio: float = 0.0
    extrapolated: bool = False
    policy: Policy = Policy.RANDOM


@dataclass(slots=True)
class Run:
    """One schedule over some images, fitted or as it was fitted.

    Attributes:
        images: which.
        full: numbers of the full steps.
        partial: of the partial ones.
        weights: by step the reads, and a weight for each read's parts; filled where `truth` is given.
        truth: the latents before each step of the full run, to fit to.
    """

    images: Images
    full: tuple[int, ...]
    partial: Partial
    weights: dict[int, tuple[list[int], Tensor]]
    truth: list[Tensor] | None = None
    computed: dict[int, Tensor] = field(default_factory=dict)  # parts of the full and partial steps
    noises: list[Tensor] = field(default_factory=list)  # of the full steps
    caches: list[tuple[int, Caches]] = field(default_factory=list)  # of the last two full steps

    def final(self) -> Tensor:
        """The final latents."""
        images, latents = self.images, self.images.start
        for step in range(STEPS):
            length = images.sigmas[step + 1] - images.sigmas[step]
            if step in self.full:
                noise, parts = images.full(step, latents)
                self.computed[step] = parts
                self.noises = [*self.noises, noise][-2:]
                if self.partial.steps:
                    self.caches = [*self.caches, (step, images.caches)][-2:]
            else:
                parts = self._skipped(step, latents, length)
            latents = latents + length * parts.sum(1)
        return latents

    def _skipped(self, step: int, latents: Tensor, length: float) -> Tensor:
        mask, found = None, None
        if step in self.partial.steps:
            mask, found = self._some(step, latents)
        if self.truth is not None:
            reads = self._reads(step)
            target = (self.truth[step + 1] - latents) / length
            self.weights[step] = reads, fitted([self.computed[read] for read in reads], target, mask)
        reads, weights = self.weights[step]
        read_parts = [
            self.computed[read] * weight.view(-1, 1, 1, 1) for read, weight in zip(reads, weights, strict=True)
        ]
        parts = torch.stack(read_parts).sum(0)
        if mask is not None and found is not None:
            parts = torch.where(mask[:, None], found, parts)
            self.computed[step] = parts
        return parts

    def _some(self, step: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The mask of the tokens that a partial step computes, and its parts."""
        images, partial = self.images, self.partial
        tokens = images.chosen(partial.policy, partial.keep_ratio, latents, self.noises, step)
        if partial.extrapolated and len(self.caches) == 2:
            (before, older), (last, newer) = self.caches
            images.set_caches(newer, older, _beyond(images, before, last, step))
        return images.mask(tokens), images.some(step, latents, tokens)[1]

    def _reads(self, step: int) -> list[int]:
        full = [before for before in self.full if before < step]
        return [*full[-TERMS:], *(each for each in self.partial.steps if full[-1] < each < step)]


class Trial:
    """The trial on one bundle.

    Args:
        bundle: of sd3-mini.
        prompts: images.
    """

    def __init__(self, bundle: Bundle, prompts: int) -> None:
        self._pipe = load_pipeline(bundle.path, "torch", settings=PruneSettings())
        self._pipe.set_progress_bar_config(disable=True)
        scheduler = type(self._pipe.scheduler).from_config(self._pipe.scheduler.config)
        scheduler.set_timesteps(STEPS)
        self._timesteps, self._matrix = scheduler.timesteps.tolist(), scheduler_matrix(scheduler)
        self._prompts = load_prompts(f"scenes:{prompts}")
        self._macs = {
            keep: costs(bundle, SIZE, SIZE, PruneSettings(keep_ratio=keep), True, "").all for keep in (*KEEP, 0.1)
        }

    def cost(self, keep_ratio: float) -> float:
        """Of a partial step, in full ones."""
        return self._macs[keep_ratio].pruned / self._macs[keep_ratio].full

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
        batches = -(-len(self._prompts) // BATCH)
        return {name: {way: _mean(values, batches) for way, values in ways.items()} for name, ways in errors.items()}

    def whole_images(self) -> dict[str, Any]:
        """By schedule the error of the final latents, and the cost in full steps."""
        fitted_to = next(self._batches(tuning_prompts(f"scenes:{BATCH}"), 1_000_000))
        recorded = trajectory(fitted_to)
        recordings = Recordings(start=fitted_to.start, parts=torch.stack(recorded.parts, 1), final=recorded.states[-1])
        batches = list(self._batches(self._prompts, 0))
        truths = [trajectory(images, keep=False).states[-1] for images in batches]
        choices = search(recordings.grams().mean(0), self._matrix, sorted({*BASES, *BASES.values()}), width=4)
        rows = {}
        for budget, base in BASES.items():
            for name, full, partial, cost in self._schedules(budget, base, choices, fitted_to, recorded):
                weights: dict[int, tuple[list[int], Tensor]] = {}
                Run(fitted_to, full, partial, weights, recorded.states).final()
                errors: list[float] = []
                for images, truth in zip(batches, truths, strict=True):
                    off = Run(images, full, partial, weights).final() - truth
                    errors += (off.flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).tolist()
                rows[name] = {"cost": cost, "full": full, "partial": partial.steps} | _interval(errors)
                _say(f"{name:58s} cost {cost:5.2f}", rows[name])
        return rows

    def _schedules(
        self, budget: int, base: int, choices: dict[int, tuple[int, ...]], images: Images, run: Trajectory
    ) -> Iterator[tuple[str, tuple[int, ...], Partial, float]]:
        for count in (budget, base):
            yield f"{count} full", choices[count], Partial(), float(count)
        full = choices[base]
        for keep, policy, extrapolated, free in VARIANTS:
            each = keep if free else self.cost(keep)
            count = min(int((budget - base) / each + 0.5), STEPS - base)
            partial = Partial(steps=tuple(range(STEPS)), keep_ratio=keep, extrapolated=extrapolated, policy=policy)
            gains = _gains(images, run, full, partial)
            steps = tuple(sorted(sorted(gains, key=lambda step: -gains[step])[:count]))
            what = f"{base} full, {count} of {keep:g} {policy}{EXTRAPOLATED if extrapolated else ''}"
            name = f"{what}{', tokens free' if free else ''}"
            placed = Partial(steps=steps, keep_ratio=keep, extrapolated=extrapolated, policy=policy)
            yield name, full, placed, base + count * self.cost(keep)

    def _batches(self, prompts: Sequence[Prompt], seed: int) -> Iterator[Images]:
        for first in range(0, len(prompts), BATCH):
            config = GenerateConfig(
                prompts=tuple(prompt.text for prompt in prompts[first : first + BATCH]),
                height=SIZE,
                width=SIZE,
                steps=STEPS,
                guidance_scale=GUIDANCE,
                seed=seed + first,
                text_arguments={"max_sequence_length": TEXT_TOKENS},
            )
            yield Images(self._pipe, config, self._timesteps)


BASES = {9: 7, 6: 4}  # full steps of all forecasts, and of a schedule that spends the rest on partial steps
# (share of the tokens, their policy, keys and values extrapolated, image tokens alone counted)
VARIANTS = (
    (0.1, Policy.RANDOM, False, False),
    (0.1, Policy.RANDOM, True, False),
    (0.3, Policy.RANDOM, False, False),
    (0.3, Policy.RANDOM, True, False),
    (0.3, Policy.NOISE, True, False),
    (0.3, Policy.CAT, True, False),
    (0.3, Policy.RANDOM, True, True),
)


def trajectory(images: Images, *, keep: bool = True) -> Trajectory:
    """The full run. `keep`: its caches too, some 45 MB a step of eight prompts."""
    states, noises, parts, caches = [images.start], [], [], []
    for step in range(STEPS):
        noise, found = images.full(step, states[-1])
        noises.append(noise)
        parts.append(found)
        if keep:
            caches.append(images.caches)
        states.append(states[-1] + (images.sigmas[step + 1] - images.sigmas[step]) * found.sum(1))
    return Trajectory(states=states, noises=noises, parts=parts, caches=caches)


def fitted(parts: Sequence[Tensor], target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The weights of parts, each (R, Q, …), whose sum is nearest to a target (R, …): (reads, Q).

    Args:
        parts: of some outputs.
        target: of all images alike, each divided by its norm.
        mask: (R, 1, H, W), where not to look.
    """
    norms = target.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    seen = torch.ones_like(target) if mask is None else (~mask).float().expand_as(target)
    basis = [((part * seen / norms).flatten()).double() for each in parts for part in each.unbind(1)]
    columns = torch.stack(basis, dim=1)
    normal = columns.T @ columns
    normal += RIDGE * normal.diagonal().mean() * torch.eye(len(normal), dtype=torch.float64)
    weights = torch.linalg.solve(normal, columns.T @ (target * seen / norms).flatten().double())
    return weights.view(len(parts), -1).float()


def combined(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Their sum with weights, (R, C, H, W)."""
    summed = [torch.einsum("q,rq...->r...", row, each) for row, each in zip(weights, parts, strict=True)]
    return torch.stack(summed).sum(0)


def _one_step(images: Images, run: Trajectory, target: int, distance: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    last, before = target - distance, target - 2 * distance
    reads = [run.parts[step] for step in range(last, -1, -distance)[:TERMS]]
    truth, beyond = run.output(target), _beyond(images, before, last, target)
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
                found[f"blended{what}"] = combined(both, fitted(both, truth, ~mask.expand_as(truth)))
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
        beyond = _beyond(images, before, last, step) if extrapolates else 0.0
        images.set_caches(run.caches[last], run.caches[before] if extrapolates else None, beyond)
        computed, mask = images.some(step, latents, tokens)[1].sum(1), images.mask(tokens)
        forecast = combined(reads, fitted(reads, truth))
        length = images.sigmas[step + 1] - images.sigmas[step]
        gain = _error(forecast, truth, mask).square() - _error(computed, truth, mask).square()
        gains[step] = length**2 * float(gain.sum())
    return gains


def _error(value: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Of each image, relative, where the mask is: (R,)."""
    where = mask.float()
    return ((value - truth) * where).flatten(1).norm(dim=1) / (truth * where).flatten(1).norm(dim=1)


def _beyond(images: Images, before: int, last: int, step: int) -> float:
    sigmas = images.sigmas
    return (sigmas[step] - sigmas[last]) / (sigmas[last] - sigmas[before])


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
    """Run both halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=16, help="scenes (default: 16)")
    arguments = parser.parse_args()
    trial = Trial(Bundle.open(arguments.bundle), arguments.prompts)
    halves: dict[str, Callable[[], dict[str, Any]]] = {"one_step": trial.one_step, "whole_images": trial.whole_images}
    result: dict[str, Any] = {"partial_step_costs": {f"{keep:g}": trial.cost(keep) for keep in (*KEEP, 0.1)}}
    with torch.no_grad():
        for name, half in halves.items():
            result[name] = half()
    for name, ways in result["one_step"].items():
        for way, row in ways.items():
            _say(f"{name:26s} {way:32s}", row)
    print(f"written to {write_result('partial', result)}")  # noqa: T201


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
