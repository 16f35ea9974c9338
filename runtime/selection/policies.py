"""The policies that choose a pruned step's tokens: the paper's, its parts, and what it is to be held against.

| policy | the tokens that are computed | source |
|---|---|---|
| `cat` | a quota of each cluster's highest relative noise, then the stalest | Cheng et al. 2025, algorithm 2 |
| `noise` | the highest relative noise | its proposition 1 alone |
| `cluster` | a quota of each cluster's highest relative noise | its algorithm 2 at t0 + 1, on every step |
| `stale` | every token in turn | round robin: staleness alone |
| `random` | others on every step | the null hypothesis |
| `ras` | the highest std of the output, times exp(drops) | Liu et al. 2025 (arXiv 2502.10389) |

Cheng, Chen, Jia 2025 is arXiv 2502.00433. All compute the same number of tokens, through every engine, without
synchronising. Ties go to the lower index.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from cat_pruning.families.family import Family
from cat_pruning.runtime.selection import kmeans, selection
from cat_pruning.runtime.selection.selector import Selector
from cat_pruning.settings import Policy, PruneSettings

RAS_STARVATION = 1.0  # k of RAS; its authors' for SD3


class CatSelector(Selector):
    """Algorithm 2: `first_selection` with clusters found once, then `next_selection` (`runtime.selection`)."""

    def __init__(self, family: Family, settings: PruneSettings, grid: tuple[int, int], noise: Tensor) -> None:
        super().__init__(family, settings, grid, noise)
        rows, num_tokens, channels = self._reference.shape
        self._position = kmeans.position_encoding(*grid, channels, self.device)  # (N, channels)
        self._initial = kmeans.initial_tokens(*grid, settings.num_clusters).to(self.device)  # (K,), from the host
        self._first_quotas, self._fresh_quotas = (
            selection.rank_quotas(fractions, self.num_chosen, settings.num_clusters, self.device)
            for fractions in ((settings.first_quota,), settings.fresh_quotas)
        )
        self._cluster_ids = torch.zeros(rows, num_tokens, dtype=torch.int64, device=self.device)
        self._selection_count = torch.zeros(rows, num_tokens, device=self.device)

    @override
    def _first(self, latents: Tensor, noise: Tensor) -> Tensor:
        relative_noise = self.relative_noise(latents, noise)
        self._find_clusters(relative_noise)
        self._selection_count.zero_()
        return self._walk(relative_noise)

    @override
    def _next(self, latents: Tensor, noise: Tensor) -> Tensor:
        return selection.next_selection(
            self.relative_noise(latents, noise),
            self._cluster_ids,
            self._selection_count,
            self.num_chosen,
            self.settings,
            self._fresh_quotas,
        )

    @override
    def _count(self, tokens: Tensor) -> None:
        counted = selection.count_selection(self._selection_count, tokens, self.settings.staleness_decay)
        self._selection_count.copy_(counted)

    def _find_clusters(self, relative_noise: Tensor) -> None:
        features = selection.cluster_features(relative_noise, self._position, self.settings.noise_scale)
        self.cluster_ids = kmeans.kmeans(features, self._initial, self.settings.kmeans_iterations)
        self._cluster_ids.copy_(self.cluster_ids)

    def _walk(self, relative_noise: Tensor) -> Tensor:
        return selection.first_selection(
            relative_noise, self._cluster_ids, self.num_chosen, self.settings, self._first_quotas
        )


class ClusterSelector(CatSelector):
    """The walk over the clusters for all n tokens on every step: no token is taken for being stale."""

    @override
    def _next(self, latents: Tensor, noise: Tensor) -> Tensor:
        return self._walk(self.relative_noise(latents, noise))


class NoiseSelector(Selector):
    """The n tokens of highest ‖RN‖₂."""

    @override
    def _next(self, latents: Tensor, noise: Tensor) -> Tensor:
        return highest(torch.linalg.vector_norm(self.relative_noise(latents, noise), dim=-1), self.num_chosen)


class StaleSelector(Selector):
    """Round robin: the next n of a fixed, well mixed order of the tokens; the same in every row."""

    def __init__(self, family: Family, settings: PruneSettings, grid: tuple[int, int], noise: Tensor) -> None:
        super().__init__(family, settings, grid, noise)
        self._order = mixed(torch.arange(self.num_tokens, device=self.device)).argsort()  # (N,)
        self._taken = torch.zeros((), dtype=torch.int64, device=self.device)

    @override
    def _first(self, latents: Tensor, noise: Tensor) -> Tensor:
        self._taken.zero_()
        return self._next(latents, noise)

    @override
    def _next(self, latents: Tensor, noise: Tensor) -> Tensor:
        places = (self._taken + torch.arange(self.num_chosen, device=noise.device)) % self.num_tokens
        self._taken += self.num_chosen
        return _every_row(self._order[places].sort().values, latents)


class RandomSelector(Selector):
    """n tokens that depend on the number of the step only; the same in every row, and on every device."""

    def __init__(self, family: Family, settings: PruneSettings, grid: tuple[int, int], noise: Tensor) -> None:
        super().__init__(family, settings, grid, noise)
        self._step = torch.zeros((), dtype=torch.int64, device=self.device)

    @override
    def _first(self, latents: Tensor, noise: Tensor) -> Tensor:
        self._step.zero_()
        return self._next(latents, noise)

    @override
    def _next(self, latents: Tensor, noise: Tensor) -> Tensor:
        self._step += 1
        tokens = mixed(torch.arange(self.num_tokens, device=noise.device) + self._step * self.num_tokens)
        return _every_row(highest(tokens.unsqueeze(0), self.num_chosen)[0], latents)


class RasSelector(Selector):
    """Region-adaptive sampling: the n highest std(output) · exp(k · drops), drops counted from the first pruned step.

    The standard deviation is over a token's values; RAS's authors take it over the channels of each latent pixel, of
    the guided output, and average over the token's pixels. Their dense steps are rows of `PruneSettings.schedule`.
    Compared by their logarithms, which cannot overflow.
    """

    def __init__(self, family: Family, settings: PruneSettings, grid: tuple[int, int], noise: Tensor) -> None:
        super().__init__(family, settings, grid, noise)
        self._drops = torch.zeros(self._reference.shape[:2], device=self.device)  # (B, N)

    @override
    def _first(self, latents: Tensor, noise: Tensor) -> Tensor:
        self._drops.zero_()
        return self._next(latents, noise)

    @override
    def _next(self, latents: Tensor, noise: Tensor) -> Tensor:
        deviation = self.guided(latents, self.noise_tokens(noise).float()).std(dim=-1)
        return highest(deviation.log() + RAS_STARVATION * self._drops, self.num_chosen)

    @override
    def _count(self, tokens: Tensor) -> None:
        self._drops.copy_(self._drops + 1.0 - torch.zeros_like(self._drops).scatter(1, tokens.long(), 1.0))


SELECTORS: dict[Policy, type[Selector]] = {
    Policy.CAT: CatSelector,
    Policy.NOISE: NoiseSelector,
    Policy.CLUSTER: ClusterSelector,
    Policy.STALE: StaleSelector,
    Policy.RANDOM: RandomSelector,
    Policy.RAS: RasSelector,
}


def ras_dense_steps(num_steps: int, full_steps: int) -> tuple[int, ...]:
    """The dense steps of RAS in a schedule: its authors' 12 and 20 of SD3's 28, and as far along in any other."""
    steps = (round(12 / 28 * num_steps), round(20 / 28 * num_steps))
    return tuple(step for step in steps if full_steps <= step < num_steps)


def highest(values: Tensor, count: int) -> Tensor:
    """The indices of the `count` highest values of each row, ascending: (B, N) -> (B, count) int32."""
    order = values.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values.int()


def mixed(numbers: Tensor) -> Tensor:
    """Well mixed int64 numbers below 2^31 from others, the same on every device (two rounds of multiply and shift)."""
    mask = (1 << 31) - 1
    for factor in (0x2C1B3C6D, 0x297A2D39):
        numbers = ((numbers ^ (numbers >> 15)) * factor) & mask
    return numbers ^ (numbers >> 15)


def _every_row(tokens: Tensor, latents: Tensor) -> Tensor:
    return tokens.int().expand(latents.shape[0], -1)
