"""Solvers in the place of a pipeline's scheduler, on a flow whose image is known and in the miniatures' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.solvers import AB2, MULTISTEP, SOLVERS, UNIPC, SolverScheduler, check_solver, solver_in
from cat_pruning.evaluation.worker import last_latents

# diffusers' schedulers, of the pair of torch and numpy; nothing that a test is about
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
MEAN, DEVIATION = 0.7, 0.4  # of the images' values, which are normal and independent
NOISE = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).double()


class Pipe:
    """What `solver_in` needs of a pipeline; its model knows the images' distribution, so its flow is known."""

    def __init__(self, **config: Any) -> None:
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler(**config)

    def __call__(self, steps: int, **options: Any) -> Tensor:
        self.scheduler.set_timesteps(steps, device="cpu", **options)
        latents = NOISE.float()
        for timestep in self.scheduler.timesteps:
            latents = self.scheduler.step(velocity(latents, timestep / 1000), timestep, latents, return_dict=False)[0]
        return latents.double()


def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
    """E[noise - image | latents]."""
    apart = (latents - (1 - sigma) * MEAN) / ((1 - sigma) ** 2 * DEVIATION**2 + sigma**2)
    return sigma * apart - MEAN - (1 - sigma) * DEVIATION**2 * apart


def error(pipe: Pipe, solver: str | None, steps: int, **options: Any) -> float:
    with solver_in(pipe, solver) if solver else nullcontext():
        return float((pipe(steps, **options) - (MEAN + DEVIATION * NOISE)).norm() / NOISE.norm())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_converges_to_the_image_that_euler_converges_to(solver: str, shift: float) -> None:
    pipe = Pipe(shift=shift)
    assert 5 * error(pipe, solver, 200) < error(pipe, None, 200) < 0.01


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_order_is_two(solver: str) -> None:
    """With steps of a fifth, about a twenty-fifth of the error; Euler's is a fifth."""
    assert error(Pipe(), solver, 40) / error(Pipe(), solver, 200) > 10
    assert error(Pipe(), None, 40) / error(Pipe(), None, 200) == pytest.approx(5, rel=0.02)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_schedule_that_the_pipeline_shifts(solver: str) -> None:
    """As FLUX's, by the number of tokens."""
    pipe = Pipe(use_dynamic_shifting=True)
    assert 5 * error(pipe, solver, 100, mu=1.1) < error(pipe, None, 100, mu=1.1)
    with solver_in(pipe, solver):
        pipe(4, mu=1.1)
        shifted = pipe.scheduler.timesteps
    pipe.scheduler.set_timesteps(4, sigmas=[1, 0.75, 0.5, 0.25], mu=1.1)
    assert torch.equal(shifted, pipe.scheduler.timesteps)


@pytest.mark.parametrize("solver", SOLVERS)
def test_sigmas_that_the_pipeline_gives_are_kept(solver: str) -> None:
    pipe = Pipe()
    with solver_in(pipe, solver):
        pipe.scheduler.set_timesteps(sigmas=[1.0, 0.4, 0.1])
        assert pipe.scheduler.timesteps.tolist() == pytest.approx([1000, 400, 100])
        assert pipe.scheduler.sigmas.tolist() == pytest.approx([1, 0.4, 0.1, 0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_step_is_eulers_and_a_second_image_the_first_ones_like(solver: str) -> None:
    pipe = Pipe()
    first = pipe(1)
    with solver_in(pipe, solver):
        assert pipe(1).numpy() == pytest.approx(first.numpy(), abs=2e-5)  # UniPC begins a millionth below pure noise
        assert torch.equal(pipe(5), pipe(5))


def test_adams_bashforth_on_steps_of_any_length() -> None:
    """A velocity that is linear in σ is integrated exactly from the second step on."""
    with solver_in(pipe := Pipe(), AB2):
        pipe.scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.25, 0.2])
        latents = torch.zeros(1)
        for index, sigma in enumerate((1.0, 0.7, 0.25, 0.2)):
            timestep = pipe.scheduler.timesteps[index]
            latents = pipe.scheduler.step(torch.tensor([2 * sigma]), timestep, latents).prev_sample
    euler = 2 * 1.0 * (0.7 - 1.0)
    assert float(latents) == pytest.approx(euler + (0 - 0.7**2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_latents_keep_their_dtype(solver: str, dtype: torch.dtype) -> None:
    with solver_in(pipe := Pipe(), solver):
        pipe.scheduler.set_timesteps(2)
        for timestep in pipe.scheduler.timesteps:
            after = pipe.scheduler.step(torch.ones(1, 3, dtype=dtype), timestep, torch.ones(1, 3, dtype=dtype))[0]
            assert after.dtype == dtype


@pytest.mark.parametrize("solver", SOLVERS)
def test_in_a_pipeline(solver: str, pipeline: Callable[..., Any], sample: Callable[..., Any]) -> None:
    """Near the pipeline's own image, not the same; its scheduler is as it was, and so is its config."""
    pipe = pipeline()
    scheduler, config = pipe.scheduler, dict(pipe.config)
    own = sample(pipe, steps=6).final
    with solver_in(pipe, solver), last_latents(pipe) as latents:
        solved = sample(pipe, steps=6).final
        assert isinstance(pipe.scheduler, SolverScheduler)
        assert torch.equal(latents[-1], solved)
        assert pipe.scheduler.config is scheduler.config
    assert (pipe.scheduler, dict(pipe.config)) == (scheduler, config)
    assert 0.01 < float((solved - own).norm() / own.norm()) < 0.6
    assert torch.equal(sample(pipe, steps=6).final, own)


def test_unipc_in_place_of_a_dpm_solver() -> None:
    """PixArt's, on its timesteps."""

    class Noisy(Pipe):
        def __init__(self) -> None:
            self.scheduler = DPMSolverMultistepScheduler(prediction_type="sample")

    pipe = Noisy()
    pipe.scheduler.set_timesteps(7)
    timesteps, sigmas = pipe.scheduler.timesteps, pipe.scheduler.sigmas
    with solver_in(pipe, UNIPC):
        pipe.scheduler.set_timesteps(7, device="cpu")
        assert torch.equal(pipe.scheduler.timesteps, timesteps)
        assert torch.equal(pipe.scheduler.sigmas, sigmas)
        latents = torch.ones(1, 4)
        for timestep in timesteps:  # a model that always sees the same image
            latents = pipe.scheduler.step(torch.full((1, 4), 0.25), timestep, latents)[0]
    assert latents.tolist()[0] == pytest.approx([0.25] * 4)


@pytest.mark.parametrize(
    ("solver", "scheduler", "words"),
    [
        (MULTISTEP, DPMSolverMultistepScheduler(), "is DPM-Solver\\+\\+ already"),
        (AB2, DPMSolverMultistepScheduler(), "expected FlowMatchEulerDiscreteScheduler"),
        (UNIPC, DDIMScheduler(), "is DDIMScheduler, expected"),
        (MULTISTEP, FlowMatchHeunDiscreteScheduler(), "is FlowMatchHeunDiscreteScheduler, expected"),
    ],
)
def test_a_scheduler_that_a_solver_cannot_stand_in_for(solver: str, scheduler: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        check_solver(solver, scheduler)
    assert "leave it out" in caught.value.remedy
