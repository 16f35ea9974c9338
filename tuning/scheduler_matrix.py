"""What a scheduler does with the outputs that it is given, as a matrix."""

from __future__ import annotations

import copy
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from cat_pruning.errors import SettingsError

TOLERANCE: Final = 1e-4  # of float32 schedulers, measured: Euler 3e-8, DPM-Solver++ 5e-7, UniPC 2e-6
_PROBES: Final = 16
_PROBE_SCALE: Final = 4.0  # of latents: what a threshold or a clip at one standard deviation would cut


class Scheduler(Protocol):
    """What of a diffusers scheduler is used here."""

    timesteps: Tensor

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *, return_dict: bool) -> Any:
        """The next sample, first in a tuple."""


def scheduler_matrix(scheduler: Scheduler) -> Tensor:
    """The matrix C of a scheduler: the sample before step k is x_k = C[k, 0] · x_0 + Σ_i C[k, i + 1] · v_i.

    v_i is the output that `step` gets on step i < k, x_n the final sample. Flow matching's Euler has C[k, i + 1] =
    σ_{i+1} − σ_i; a scheduler with memory (DPM-Solver++, UniPC) has a matrix too, because it adds up samples and
    outputs with coefficients of the timesteps alone. It is run once on a basis, one number a basis vector, and then
    once on random numbers, which the matrix has to reproduce.

    Args:
        scheduler: of diffusers, its timesteps set and no step taken. A copy of it runs.

    Returns:
        (n + 1, n + 1) float64 on the CPU; n is the number of calls of `step`. Synchronises.

    Raises:
        SettingsError: the scheduler has taken a step, or what it does depends on chance (ancestral, SDE) or on the
            values (thresholding, clipping), so that it has no matrix.
    """
    name = type(scheduler).__name__
    if getattr(scheduler, "step_index", None) is not None:
        raise SettingsError(f"{name} is at step {scheduler.step_index} of a run", "call its set_timesteps first")  # type: ignore[attr-defined]
    count = len(scheduler.timesteps)
    matrix = _run(scheduler, torch.eye(count + 1, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    probes = _PROBE_SCALE * torch.randn(count + 1, _PROBES, dtype=torch.float64, generator=generator)
    found, expected = _run(scheduler, probes), matrix @ probes
    error = float((found - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise SettingsError(
            f"{name} is not linear in the model's outputs (off by {error:.1e}, at most {TOLERANCE:.0e} was expected)",
            "give a scheduler without noise, thresholding or clipping: Euler, DDIM, DPM-Solver++ or UniPC",
        )
    return matrix


def _run(scheduler: Scheduler, vectors: Tensor) -> Tensor:
    """The samples of a run on x_0 and the outputs, all given as rows: (n + 1, P) → (n + 1, P)."""
    running = copy.deepcopy(scheduler)
    rows = vectors.view(len(vectors), 1, -1, 1, 1).to(running.timesteps.device)  # some keep their sigmas there too
    samples = [rows[0]]
    for output, timestep in zip(rows[1:], running.timesteps, strict=True):
        samples.append(running.step(output, timestep, samples[-1], return_dict=False)[0])
    return torch.stack([sample.flatten().double().cpu() for sample in samples])
