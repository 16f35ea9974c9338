"""The model as a scheduler sees it, at any step and any latents: the pipeline's calls replayed, guidance included."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.tools.generate import GenerateConfig, generate, never_pruned
from cat_pruning.tuning.recorder import SchedulerStep, recorded_steps

_TOLERANCE: Final = 1e-3  # of the output: half precision's guidance, rounded in another order


class _Enough(Exception):
    """The first step is done."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """One batch's call of the transformer: what it is called with on every step, and rows a prompt."""

    arguments: dict[str, Any]
    latents: Tensor
    timestep: Tensor
    rows: int  # a prompt's: 2 under batched guidance


class Replay:
    """A function (step, latents) → what the scheduler gets on that step, of all prompts of some pipeline calls.

    Each call is begun once, and broken off after its first step, to learn what the pipeline passes to the transformer.
    Later the transformer is called in the same way on other latents, and what it returns is combined as in
    classifier-free guidance: negative + scale · (positive − negative). That this is what the pipeline does is checked
    on the first step.

    Args:
        pipe: a pipeline with a `CatTransformer`; its settings are changed to compute everything.
        configs: the calls.
        timesteps: the transformer's, one a step.

    Attributes:
        scheduler: the pipeline's as it was before the first step of a call, its timesteps set.

    Raises:
        SettingsError: the pipeline combines the rows in another way.
    """

    scheduler: Any

    def __init__(self, pipe: Any, configs: Sequence[GenerateConfig], timesteps: Sequence[float]) -> None:
        self._pipe, self._configs, self._timesteps = pipe, configs, timesteps
        self._calls = [self._begun(config) for config in configs]
        self._settings = never_pruned(pipe.transformer.settings, len(timesteps))

    def __call__(self, step: int, latents: Tensor) -> Tensor:
        """The outputs at `latents` (R, …), float32 on the CPU; the batches one after another."""
        self._pipe.transformer.settings = self._settings
        outputs, first = [], 0
        for config, call in zip(self._configs, self._calls, strict=True):
            count = len(config.prompts)
            outputs.append(self._output(call, config, step, latents[first : first + count]))
            first += count
        return torch.cat(outputs)

    @torch.no_grad()
    def _output(self, call: _Call, config: GenerateConfig, step: int, latents: Tensor) -> Tensor:
        like = call.latents
        rows = torch.cat([latents] * call.rows).to(like.device, like.dtype)
        timestep = torch.full_like(call.timestep, self._timesteps[step])
        noise = self._pipe.transformer(hidden_states=rows, timestep=timestep, **call.arguments)[0]
        return _guided(noise, latents, call.rows, config.guidance_scale)

    def _begun(self, config: GenerateConfig) -> _Call:
        calls: list[_Call] = []
        transformer = self._pipe.transformer

        def learn(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            latents = named["hidden_states"]
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
            with recorded_steps(self._pipe) as steps, self._first_step_only():
                generate(self._pipe, never_pruned(transformer.settings, config.steps), config)
        except _Enough:
            pass
        finally:
            hook.remove()
        self._check(calls[0], config, steps[0], len(calls))
        return calls[0]

    @contextmanager
    def _first_step_only(self) -> Iterator[None]:
        """Break off the pipeline's call after the first step of its scheduler."""
        scheduler = self._pipe.scheduler
        step = scheduler.step

        def once(*arguments: Any, **options: Any) -> Any:
            self.scheduler = copy.deepcopy(scheduler)
            del self.scheduler.step  # this function
            step(*arguments, **options)
            raise _Enough

        scheduler.step = once
        try:
            yield
        finally:
            scheduler.step = step

    @torch.no_grad()
    def _check(self, call: _Call, config: GenerateConfig, first: SchedulerStep, count: int) -> None:
        noise = self._pipe.transformer(hidden_states=call.latents, timestep=call.timestep, **call.arguments)[0]
        found = _guided(noise, first.sample, call.rows, config.guidance_scale)
        rows = torch.cat([first.sample] * call.rows).to(call.latents.dtype)
        same_rows = torch.equal(call.latents.cpu(), rows)
        off = float((found - first.output).norm() / first.output.norm()) if found.shape == first.output.shape else 1.0
        if count != 1 or not same_rows or not off <= _TOLERANCE:
            raise SettingsError(
                f"{type(self._pipe).__name__} makes of the model's outputs what tuning does not know ({count} calls a "
                f"step, off by {off:.1e})",
                "tune a text-to-image pipeline of the bundle's own class",
            )


def _guided(noise: Tensor, latents: Tensor, rows: int, scale: float) -> Tensor:
    """What the pipeline makes of the transformer's output, for latents of (R, …)."""
    noise = noise.detach().to("cpu", torch.float32)
    if noise.shape[1:] != latents.shape[1:]:  # a model that predicts its variance too
        noise = noise[:, : latents.shape[1]]
    if rows == 1:
        return noise
    negative, positive = noise.chunk(2)
    return negative + scale * (positive - negative)
