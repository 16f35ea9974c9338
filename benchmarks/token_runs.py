"""Runs of schedules that may compute some tokens on a step, fitted in the loop; for trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from token_steps import Caches, Images
from torch import Tensor

from cat_pruning.settings import Policy

STEPS, TERMS, RIDGE = 28, 3, 1e-7


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
        blended: whether what was computed is combined with the outputs that the others read, by weights of its own.
    """

    steps: tuple[int, ...] = ()
    keep_ratio: float = 0.0
    extrapolated: bool = False
    policy: Policy = Policy.RANDOM
    blended: bool = False


Weights = tuple[list[int], Tensor, Tensor | None]  # reads, their parts' weights, and those of the computed tokens


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
    weights: dict[int, Weights]
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
            target = (self.truth[step + 1] - latents) / length
            self.weights[step] = self._fit(self._reads(step), target, mask, found)
        reads, weights, of_computed = self.weights[step]
        read = [self.computed[each] for each in reads]
        parts = weighed(read, weights)
        if mask is not None and found is not None:
            own = found if of_computed is None else weighed([*read, found], of_computed)
            parts = torch.where(mask[:, None], own, parts)
            self.computed[step] = parts
        return parts

    def _fit(self, reads: list[int], target: Tensor, mask: Tensor | None, found: Tensor | None) -> Weights:
        read = [self.computed[each] for each in reads]
        of_computed = None
        if self.partial.blended and mask is not None and found is not None:
            of_computed = fitted([*read, found], target, ~mask)
        return reads, fitted(read, target, mask), of_computed

    def _some(self, step: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The mask of the tokens that a partial step computes, and its parts."""
        images, partial = self.images, self.partial
        tokens = images.chosen(partial.policy, partial.keep_ratio, latents, self.noises, step)
        if partial.extrapolated and len(self.caches) == 2:
            (before, older), (last, newer) = self.caches
            images.set_caches(newer, older, beyond_last(images, before, last, step))
        return images.mask(tokens), images.some(step, latents, tokens)[1]

    def _reads(self, step: int) -> list[int]:
        full = [before for before in self.full if before < step]
        return [*full[-TERMS:], *(each for each in self.partial.steps if full[-1] < each < step)]


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
    weights: Tensor = torch.linalg.solve(normal, columns.T @ (target * seen / norms).flatten().double())
    return weights.view(len(parts), -1).float()


def weighed(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Their sum with weights, part by part: (R, Q, C, H, W)."""
    return torch.stack([part * row.view(-1, 1, 1, 1) for part, row in zip(parts, weights, strict=True)]).sum(0)


def combined(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """What the scheduler gets of it: (R, C, H, W)."""
    return weighed(parts, weights).sum(1)


def beyond_last(images: Images, before: int, last: int, step: int) -> float:
    """How far a step is after the last of two, in units of their distance."""
    sigmas = images.sigmas
    return (sigmas[step] - sigmas[last]) / (sigmas[last] - sigmas[before])
