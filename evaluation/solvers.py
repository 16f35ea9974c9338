"""Solvers of higher order in the place of the pipeline's scheduler: what fewer full steps are worth with a better one.

A solver keeps the scheduler's configuration, its shift and all that the pipeline asks it for; the step is another's.
Every step computes every token, once.

For flows the sigmas before the shift are 1, 1 - 1/S, ..., 1/S, as FLUX's pipeline passes them. FlowMatchEuler's default
goes down to 1/1000 instead and then takes a step that changes next to nothing; over the step before it, which is five
units of log-SNR long, DPM-Solver++ and UniPC would extrapolate: on sd3-mini their errors are then twice as large.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from cat_pruning.errors import SettingsError

MULTISTEP = "multistep"  # DPM-Solver++ 2M, diffusers'
UNIPC = "unipc"  # UniPC, diffusers'
AB2 = "ab2"  # Adams-Bashforth of two steps, over the flow
SOLVERS = (MULTISTEP, UNIPC, AB2)
LARGEST_SIGMA = 1 - 1e-6  # pure noise has log-SNR -inf, of which DPM-Solver++ and UniPC take differences


def check_solver(name: str, scheduler: Any) -> None:
    """Check that a solver can stand in for a pipeline's scheduler.

    Raises:
        SettingsError: the scheduler is of neither of the two kinds that solvers are known for, or is the solver.
    """
    kind = type(scheduler).__name__
    if is_flow(scheduler) or (name == UNIPC and _is_dpm_solver(scheduler)):
        return
    if name == MULTISTEP and _is_dpm_solver(scheduler):
        raise SettingsError(
            f"method {name}: the pipeline's own scheduler, {kind}, is DPM-Solver++ already",
            "leave it out: fewer-steps is that",
        )
    raise SettingsError(
        f"method {name}: the pipeline's scheduler is {kind}, expected FlowMatchEulerDiscreteScheduler", "leave it out"
    )


@contextmanager
def solver_in(pipe: Any, name: str) -> Iterator[None]:
    """Let a pipeline solve by `name`, one of `SOLVERS`, meanwhile.

    Raises:
        SettingsError: see `check_solver`.
    """
    scheduler = pipe.scheduler
    check_solver(name, scheduler)
    pipe.scheduler = SolverScheduler(scheduler, AdamsBashforth() if name == AB2 else _diffusers_solver(name, scheduler))
    try:
        yield
    finally:
        pipe.scheduler = scheduler


class SolverScheduler:
    """A pipeline's scheduler with another solver's step; all else is the scheduler's own.

    Args:
        scheduler: of the pipeline; its timesteps are set.
        solver: begins with the timesteps and sigmas of a schedule, then makes steps.
    """

    order = 1  # calls of the model in a step

    def __init__(self, scheduler: Any, solver: Any) -> None:
        self._scheduler, self._solver = scheduler, solver
        self.set_timesteps = self._beginning(scheduler.set_timesteps)

    def __getattr__(self, name: str) -> Any:
        """What is not the solver's is the scheduler's."""
        return getattr(self._scheduler, name)

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> tuple[Tensor] | Any:
        """The latents of the next timestep, in the dtype of `model_output`, as diffusers' schedulers return them."""
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        after = self._solver.step(model_output, timestep, sample, return_dict=False)[0]
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def _beginning(self, set_timesteps: Callable[..., None]) -> Callable[..., None]:
        """`set_timesteps`, with its signature, which pipelines look at, and the solver's beginning after it."""

        @functools.wraps(set_timesteps)
        def begin(num_inference_steps: int | None = None, device: Any = None, **options: Any) -> None:
            if is_flow(self._scheduler) and num_inference_steps is not None and options.get("sigmas") is None:
                options["sigmas"] = whole_steps(num_inference_steps)
            set_timesteps(num_inference_steps, device, **options)
            self._solver.begin(self._scheduler.timesteps, self._scheduler.sigmas)

        return begin


def whole_steps(steps: int) -> list[float]:
    """The sigmas of a flow's steps before the shift: equally far apart, the last as far from 0."""
    return [1 - step / steps for step in range(steps)]


class AdamsBashforth:
    """Adams-Bashforth of two steps with steps of any length; the first step is Euler's.

    With the velocity v_i at σ_i and h_i = σ_{i+1} - σ_i, Hairer, Nørsett, Wanner, Solving ODEs I, III.5:

        x_{i+1} = x_i + h_i · ((1 + r/2) · v_i - r/2 · v_{i-1}),    r = h_i / h_{i-1}
    """

    def begin(self, timesteps: Tensor, sigmas: Tensor) -> None:
        """Begin an image. timesteps: (S,); sigmas: (S + 1,), the last one of the image itself."""
        values: Sequence[float] = sigmas.double().tolist()
        self._lengths = [after - before for before, after in itertools.pairwise(values)]
        self._index = 0
        self._before: Tensor | None = None

    def step(self, velocity: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool) -> tuple[Tensor]:
        """The latents at the next sigma, computed in fp32."""
        length, now = self._lengths[self._index], velocity.float()
        change = now
        if self._before is not None:
            half = length / self._lengths[self._index - 1] / 2
            change = (1 + half) * now - half * self._before
        self._index, self._before = self._index + 1, now
        return ((sample.float() + length * change).to(velocity.dtype),)


class _DiffusersSolver:
    """A scheduler of diffusers as a solver of another scheduler's timesteps and sigmas."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.step = scheduler.step

    def begin(self, timesteps: Tensor, sigmas: Tensor) -> None:
        """Begin an image. timesteps: (S,); sigmas: (S + 1,), the last one of the image itself."""
        self._scheduler.set_timesteps(len(timesteps), device=timesteps.device)  # which forgets the last image
        flow = self._scheduler.config.use_flow_sigmas
        self._scheduler.sigmas = sigmas.cpu().clamp(max=LARGEST_SIGMA) if flow else sigmas.cpu()
        self._scheduler.timesteps = timesteps


def _diffusers_solver(name: str, scheduler: Any) -> _DiffusersSolver:
    from diffusers.schedulers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    if not is_flow(scheduler):
        return _DiffusersSolver(UniPCMultistepScheduler.from_config(scheduler.config))
    kind = DPMSolverMultistepScheduler if name == MULTISTEP else UniPCMultistepScheduler
    return _DiffusersSolver(kind(prediction_type="flow_prediction", use_flow_sigmas=True))


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler steps over a flow, x_σ = (1 - σ) · image + σ · noise, by Euler's method."""
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def _is_dpm_solver(scheduler: Any) -> bool:
    from diffusers.schedulers import DPMSolverMultistepScheduler

    return isinstance(scheduler, DPMSolverMultistepScheduler)
