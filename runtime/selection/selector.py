"""Which tokens each pruned step of an image computes, on memory that stays where it is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cat_pruning.families.family import Family
from cat_pruning.settings import PruneSettings


class Selector(ABC):
    """A policy over the steps of one image.

    The first pruned step's tokens come from `first`; those of every later one from a call of the selector itself, a
    `TokenChoice` that changes its own memory and nothing else, so that it can be captured together with the step that
    it chooses for. A policy implements `_next`, and `_first` where that differs. It allocates its memory when it is
    made, for images of one shape, and serves them in turn.

    Tokens of reference images (FLUX.1 Kontext) have no prediction that a pipeline reads, and so no relative noise: the
    same share of them as of the image's is computed on every pruned step, in turn.

    Args:
        family: of the model.
        settings: what to compute.
        grid: image tokens (high, wide).
        noise: of the shape and dtype of the predictions, and where they are; its values are not read.

    Attributes:
        num_tokens, num_chosen: the image's tokens, and how many of them a pruned step computes.
        num_kept: n, with those of reference images.

    Raises:
        ShapeError: the image has fewer tokens than there are clusters.
    """

    def __init__(
        self,
        family: Family,
        settings: PruneSettings,
        grid: tuple[int, int],
        noise: Tensor,
    ) -> None:
        self.num_tokens = grid[0] * grid[1]
        self.num_chosen = settings.num_kept(self.num_tokens)
        self.settings, self.grid, self.device = settings, grid, noise.device
        self._family = family
        self._num_references = family.predicted_noise(noise).shape[1] - self.num_tokens
        self.num_kept = settings.num_kept(self.num_tokens + self._num_references)
        self._references_taken = torch.zeros((), dtype=torch.int64, device=self.device)
        self._reference = torch.zeros_like(self.noise_tokens(noise))  # (B, N, channels), n_t0
        self.reset()

    def reset(self) -> None:
        """Forget the image; the memory is kept for the next one."""
        self.has_begun = False  # whether the image had a pruned step
        self.cluster_ids: Tensor | None = None  # (B, N), the image's own copy; None where there are no clusters

    def refer_to(self, noise: Tensor) -> None:
        """Take the noise prediction of step t0, whose change is the relative noise."""
        self._reference.copy_(self.noise_tokens(noise))

    def first(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The tokens of the first pruned step, (B, n) int32.

        Args:
            latents: of the step.
            noise: the last prediction, in the transformer's layout.
        """
        self.has_begun = True
        self._references_taken.zero_()
        tokens = self._first(latents, noise)
        self._count(tokens)
        return self._with_references(tokens)

    def __call__(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The tokens of a later pruned step, (B, n) int32: see `first`. Does not synchronise."""
        tokens = self._next(latents, noise)
        self._count(tokens)
        return self._with_references(tokens)

    def count(self, tokens: Tensor) -> None:
        """Tell the policy of a full step, (B, N), in ascending order."""
        if self.has_begun:
            self._count(tokens[:, : self.num_tokens])

    @abstractmethod
    def _next(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The tokens of a pruned step."""

    def _first(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The tokens of the first one, which is never captured."""
        return self._next(latents, noise)

    def _count(self, tokens: Tensor) -> None:  # noqa: B027  # most policies have no counts
        """Remember what a step computes."""

    def noise_tokens(self, noise: Tensor) -> Tensor:
        """The prediction that a selection goes by, (B, N, channels), of the image's tokens."""
        return self._family.predicted_noise(noise)[:, : self.num_tokens]

    def _with_references(self, tokens: Tensor) -> Tensor:
        """The image's tokens and the next of the reference images', which follow them: (B, num_chosen) -> (B, n)."""
        if not self._num_references:
            return tokens
        count = self.num_kept - self.num_chosen
        places = (self._references_taken + torch.arange(count, device=self.device)) % self._num_references
        self._references_taken += count
        references = (self.num_tokens + places).sort().values.int()
        return torch.cat([tokens, references.expand(tokens.shape[0], -1)], dim=1)

    def relative_noise(self, latents: Tensor, noise: Tensor) -> Tensor:
        """RN, (B, N, channels) fp32; under guidance every row's is that of the prompt's positive row."""
        return self.guided(latents, (self.noise_tokens(noise) - self._reference).float())

    def guided(self, latents: Tensor, values: Tensor) -> Tensor:
        """`values`, a row of the batch each, with every row's replaced by that of its prompt's positive row."""
        return values[guiding_rows(latents)] if self._family.batched_guidance else values


def negative_rows(latents: Tensor) -> Tensor:
    """Whether a row of the batch is of a negative prompt, (B,) bool: see `guiding_rows`."""
    return guiding_rows(latents) != torch.arange(latents.shape[0], device=latents.device)


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
