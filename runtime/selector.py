"""Algorithm 2 over the steps of one image, on memory that stays where it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cat_pruning.exporter.families.family import Family
from cat_pruning.runtime import kmeans, selection
from cat_pruning.settings import PruneSettings


class Selector:
    """Which tokens each pruned step of an image computes (`cat_pruning.runtime.selection`).

    The first pruned step's come from `first`, which finds the clusters; those of every later one from a call of the
    selector itself, a `TokenChoice` that changes its own memory and nothing else, so that it can be captured together
    with the step that it chooses for.

    Args:
        family, config: of the model.
        settings: what to compute.
        grid: image tokens (high, wide).
        device: where noise and latents are.

    Raises:
        ShapeError: the image has fewer tokens than there are clusters.
    """

    def __init__(
        self,
        family: Family,
        config: Mapping[str, Any],
        settings: PruneSettings,
        grid: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.num_kept = settings.num_kept(grid[0] * grid[1])
        self._family, self._config, self._settings, self._grid = family, config, settings, grid
        self._initial = kmeans.initial_tokens(*grid, settings.num_clusters).to(device)
        self._position: Tensor | None = None  # (N, channels)
        self._reference: Tensor | None = None  # (B, N, channels), n_t0
        self._cluster_ids: Tensor | None = None  # (B, N)
        self._selection_count: Tensor | None = None  # (B, N)
        self._keep_indices: Tensor | None = None  # (B, n)
        self.reset()

    def reset(self) -> None:
        """Forget the image; the memory is kept for the next one."""
        self.cluster_ids: Tensor | None = None  # (B, N), the image's own copy; None before its first pruned step

    def refer_to(self, noise: Tensor) -> None:
        """Take the noise prediction of step t0, whose change is the relative noise."""
        self._reference = _kept(self._reference, self._tokens(noise))

    def first(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The tokens of the first pruned step, (B, n) int32, and the clusters for all later ones.

        Args:
            latents: of the step.
            noise: the last prediction, in the transformer's layout.
        """
        settings, relative_noise = self._settings, self._relative_noise(latents, noise)
        if self._position is None:
            self._position = kmeans.position_encoding(*self._grid, relative_noise.shape[-1], noise.device)
        features = selection.cluster_features(relative_noise, self._position, settings.noise_scale)
        self.cluster_ids = kmeans.kmeans(features, self._initial, settings.kmeans_iterations)
        self._cluster_ids = _kept(self._cluster_ids, self.cluster_ids)
        count = torch.zeros(relative_noise.shape[:2], device=noise.device)
        self._selection_count = _kept(self._selection_count, count)
        tokens = selection.first_selection(relative_noise, self._cluster_ids, self.num_kept, settings)
        self.count(tokens)
        return tokens

    def __call__(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The tokens of a later pruned step, (B, n) int32: see `first`. Does not synchronise."""
        assert self._cluster_ids is not None
        assert self._selection_count is not None
        relative_noise = self._relative_noise(latents, noise)
        tokens = selection.next_selection(
            relative_noise, self._cluster_ids, self._selection_count, self.num_kept, self._settings
        )
        self.count(tokens)
        self._keep_indices = _kept(self._keep_indices, tokens)
        return self._keep_indices

    def count(self, tokens: Tensor) -> None:
        """Count the tokens of a step, if the image has clusters already."""
        if self.cluster_ids is not None:
            assert self._selection_count is not None
            counted = selection.count_selection(self._selection_count, tokens, self._settings.staleness_decay)
            self._selection_count.copy_(counted)

    @property
    def chosen(self) -> Tensor:
        """A copy of what the last call chose, or the last replay of one: (B, n) int32."""
        assert self._keep_indices is not None
        return self._keep_indices.clone()

    def _relative_noise(self, latents: Tensor, noise: Tensor) -> Tensor:
        """RN, (B, N, channels) fp32; under guidance every row's is that of the prompt's positive row."""
        assert self._reference is not None
        relative_noise = (self._tokens(noise) - self._reference).float()
        return relative_noise[guiding_rows(latents)] if self._family.batched_guidance else relative_noise

    def _tokens(self, noise: Tensor) -> Tensor:
        return self._family.predicted_noise(noise, self._config)


def _kept(memory: Tensor | None, values: Tensor) -> Tensor:
    """`values` in `memory`, where that is of their shape and dtype; else in new memory."""
    if memory is None or memory.shape != values.shape or memory.dtype != values.dtype:
        return values.clone()
    return memory.copy_(values)


def guiding_rows(latents: Tensor) -> Tensor:
    """The row of the batch that each row's selection is taken from, (B,) int64.

    With classifier-free guidance the rows are [negative; positive] over the same latents, and both follow the
    positive row. Without it the halves of the batch differ, and every row follows itself. That is read off the
    latents on their device: the values depend on data, the shapes do not, and nothing synchronises.
    """
    batch = latents.shape[0]
    rows = torch.arange(batch, device=latents.device)
    if batch % 2:
        return rows
    half = batch // 2
    guided = (latents[:half] == latents[half:]).all()
    return torch.where(guided, rows % half + half, rows)
