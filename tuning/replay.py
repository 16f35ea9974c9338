"""The model as a scheduler sees it, at any step and any latents: the pipeline's calls replayed, guidance included."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cat_pruning.tools.generate import GenerateConfig, generate, never_pruned
from cat_pruning.tuning.guidance import parts_of


class _Enough(Exception):
    """The model was called once."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """One batch's call of the transformer: what it is called with on every step, and rows a prompt."""

    arguments: dict[str, Any]
    latents: Tensor
    timestep: Tensor
    rows: int  # a prompt's: 2 under batched guidance


class Replay:
    """A function (step, latents) → the parts of what the scheduler gets on that step, of all prompts of some calls.

    Each call is begun once, and broken off after the model's first output, to learn what the pipeline passes to the
    transformer. Later the transformer is called in the same way on other latents. That guidance is the plain one was
    checked when the runs were recorded.

    Args:
        pipe: a pipeline with a `CatTransformer`.
        configs: the calls.
        timesteps: the transformer's, one a step.

    Attributes:
        scheduler: the pipeline's as it was before the first step of a call, its timesteps set.
    """

    scheduler: Any

    def __init__(self, pipe: Any, configs: Sequence[GenerateConfig], timesteps: Sequence[float]) -> None:
        self._pipe, self._configs, self._timesteps = pipe, configs, timesteps
        self._calls = [self._begun(config) for config in configs]
        self._settings = never_pruned(pipe.transformer.settings, len(timesteps))

    def __call__(self, step: int, latents: Tensor) -> Tensor:
        """The parts of the outputs at `latents` (R, …): (R, Q, …), float32 on the CPU; a batch after another.

        R is the number of all prompts, or of those of the first calls.
        """
        outputs, first = [], 0
        for config, call in zip(self._configs, self._calls, strict=True):
            if first == len(latents):
                break
            count = len(config.prompts)
            outputs.append(self._output(call, config, step, latents[first : first + count]))
            first += count
        return torch.cat(outputs)

    @torch.no_grad()
    def _output(self, call: _Call, config: GenerateConfig, step: int, latents: Tensor) -> Tensor:
        like = call.latents
        rows = torch.cat([latents] * call.rows).to(like.device, like.dtype)
        timestep = torch.full_like(call.timestep, self._timesteps[step])
        with self._pipe.transformer.image(self._settings) as image:
            noise = image(rows, timestep=timestep, **call.arguments)[0]
        return parts_of(noise, latents, config.guidance_scale)

    def _begun(self, config: GenerateConfig) -> _Call:
        calls: list[_Call] = []
        transformer = self._pipe.transformer

        def learn(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            latents = arguments[0] if arguments else named["hidden_states"]  # PixArt's pipelines pass it without a name
            rest = {name: value for name, value in named.items() if name not in ("hidden_states", "timestep")}
            calls.append(
                _Call(
                    arguments=rest | {"return_dict": False},
                    latents=latents,
                    timestep=named["timestep"].clone(),
                    rows=latents.shape[0] // len(config.prompts),
                )
            )

        hook = transformer.register_forward_pre_hook(learn, with_kwargs=True)
        try:
            with self._first_step_only():
                generate(self._pipe, never_pruned(transformer.settings, config.steps), config)
        except _Enough:
            pass
        finally:
            hook.remove()
        return calls[0]

    @contextmanager
    def _first_step_only(self) -> Iterator[None]:
        """Break off the pipeline's call before the first step of its scheduler."""
        scheduler = self._pipe.scheduler

        def stop(*arguments: Any, **options: Any) -> Any:
            self.scheduler = copy.deepcopy(scheduler)
            del self.scheduler.step  # this function
            raise _Enough

        scheduler.step = stop
        try:
            yield
        finally:
            del scheduler.step
