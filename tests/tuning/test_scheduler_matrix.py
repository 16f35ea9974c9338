from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.tuning.scheduler_matrix import scheduler_matrix

# diffusers 0.42 makes an array of a tensor in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def scheduler(name: str, steps: int = 12, **config: Any) -> Any:
    made = getattr(diffusers, name)(**config)
    made.set_timesteps(steps)
    return made


def run_of(made: Any, start: Tensor, outputs: Tensor) -> list[Tensor]:
    samples = [start]
    for timestep, output in zip(made.timesteps, outputs, strict=True):
        samples.append(made.step(output, timestep, samples[-1], return_dict=False)[0])
    return samples


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", FLOW),
        ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction", "solver_order": 3}),
        ("UniPCMultistepScheduler", FLOW),
        ("DDIMScheduler", {"clip_sample": False}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ],
)
def test_the_matrix_makes_the_samples_of_a_real_run(name: str, config: dict[str, Any]) -> None:
    made = scheduler(name, **config)
    matrix, count = scheduler_matrix(made), len(made.timesteps)
    assert matrix.shape == (count + 1, count + 1)
    generator = torch.Generator().manual_seed(1)
    start, outputs = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(count, 2, 3, 4, 4, generator=generator)
    vectors = torch.cat([start[None], outputs]).double()
    samples = run_of(made, start, outputs)  # the matrix took no step of this scheduler
    for step, sample in enumerate(samples):
        expected = torch.tensordot(matrix[step], vectors, dims=1)
        assert float((sample - expected).norm() / expected.norm()) < 1e-5, step
    # What a sample is made of lies before it.
    assert torch.equal(matrix[:, 1:].triu(), torch.zeros(count + 1, count))


def test_eulers_matrix_has_the_steps_of_sigma() -> None:
    made = scheduler("FlowMatchEulerDiscreteScheduler", steps=5)
    lengths = made.sigmas.diff().double()
    assert torch.allclose(scheduler_matrix(made)[-1], torch.cat([torch.ones(1), lengths]).double(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDPMScheduler", {}),
    ],
)
def test_a_scheduler_that_is_not_linear_is_refused_by_name(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"^{name} is not linear"):
        scheduler_matrix(scheduler(name, **config))


def test_a_scheduler_that_has_run_is_refused() -> None:
    made = scheduler("FlowMatchEulerDiscreteScheduler", steps=3)
    run_of(made, torch.zeros(1, 1, 1, 1), torch.zeros(3, 1, 1, 1, 1))
    with pytest.raises(SettingsError, match="is at step 3 of a run; call its set_timesteps first"):
        scheduler_matrix(made)
