"""Images in progress on the torch engine, a step at a time and back again, with their keys and values; for trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cat_pruning.engines.step_engine import StepSession
from cat_pruning.families.family import Family
from cat_pruning.runtime.image import every_token
from cat_pruning.runtime.selection.policies import SELECTORS, highest
from cat_pruning.settings import Policy, PruneSettings
from cat_pruning.tools.generate import GenerateConfig
from cat_pruning.tuning.guidance import parts_of
from cat_pruning.tuning.replay import Replay

Caches = list[Tensor]


class Images:
    """The images of one call of a pipeline, whose steps are computed as told.

    Args:
        pipe: over the torch engine.
        config: the call, with guidance.
        timesteps: the transformer's.

    Attributes:
        sigmas: of the scheduler, one more than steps.
        start: noise, (R, C, H, W).
        num_tokens: of an image.
    """

    def __init__(self, pipe: Any, config: GenerateConfig, timesteps: Sequence[float]) -> None:
        replay = Replay(pipe, [config], timesteps)  # begins the call, and breaks it off
        engine, session = pipe.transformer.engine, pipe.transformer._sampling().image.session
        self._session: StepSession = engine.session()
        self._session.begin(session._dims, session._inputs, timesteps)
        self._family: Family = engine.family
        self._timesteps, self._guidance = timesteps, config.guidance_scale
        self.sigmas: list[float] = replay.scheduler.sigmas.tolist()
        self.start = replay._calls[0].latents[: len(config.prompts)].float().clone()
        self._grid = tuple(int(size) // self._family.config["patch_size"] for size in self.start.shape[-2:])
        self.num_tokens = self._grid[0] * self._grid[1]

    def full(self, step: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Every token: the transformer's rows (2 R, …), and the parts of the output, (R, 2, …)."""
        return self.some(step, latents, every_token(_rows(latents), self.num_tokens))

    def some(self, step: int, latents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Some tokens, (2 R, n); what the others have is of no use."""
        noise = self._session.step(_rows(latents), self._timesteps[step], tokens)
        return noise, parts_of(noise, latents, self._guidance)

    def mask(self, tokens: Tensor) -> Tensor:
        """Whether a latent's place is of a computed token: broadcasts with (R, C, H, W)."""
        prompts = len(self.start)
        return self._family.token_mask(tokens[:prompts], self.start).bool()

    @property
    def caches(self) -> Caches:
        """A copy of every layer's keys and values."""
        return [cache.clone() for cache in self._session._caches]  # type: ignore[attr-defined]

    def set_caches(self, last: Caches, before: Caches | None = None, beyond: float = 0.0) -> None:
        """Let the next step read last + beyond · (last - before)."""
        for index, cache in enumerate(self._session._caches):  # type: ignore[attr-defined]
            cache.copy_(last[index])
            if before is not None:
                cache.add_(last[index], alpha=beyond).sub_(before[index], alpha=beyond)

    def chosen(self, policy: Policy, keep_ratio: float, latents: Tensor, noises: Sequence[Tensor], seed: int) -> Tensor:
        """The tokens of a partial step, (2 R, n) int32.

        Args:
            policy: RANDOM, or one that chooses by what changed between two outputs.
            keep_ratio: of the tokens.
            latents: of the step.
            noises: rows of the last two full outputs, the older first, or of one.
            seed: of RANDOM.
        """
        if policy is Policy.RANDOM:
            count = max(1, int(keep_ratio * self.num_tokens))
            drawn = torch.rand(1, self.num_tokens, generator=torch.Generator().manual_seed(seed))
            return highest(drawn, count).expand(2 * len(latents), -1).contiguous()
        settings = PruneSettings(keep_ratio=keep_ratio, policy=policy)
        selector = SELECTORS[policy](self._family, settings, self._grid, noises[-1])
        selector.refer_to(noises[0])
        return selector.first(_rows(latents), noises[-1])

    def worst(self, keep_ratio: float, error: Tensor) -> Tensor:
        """The tokens where an error (R, C, H, W) is the largest, which no policy can know: (2 R, n)."""
        by_token = self._family.predicted_noise(error).square().sum(-1)
        tokens = highest(by_token, max(1, int(keep_ratio * self.num_tokens)))
        return torch.cat([tokens, tokens])


def _rows(latents: Tensor) -> Tensor:
    return torch.cat([latents, latents])
