"""The fit as a job of a worker: schedules of some budgets, from recordings and with the model that made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from cat_pruning.evaluation.pool import Pool, Tell
from cat_pruning.tools.generate import GenerateConfig
from cat_pruning.tuning.closed_loop import ClosedLoopFit
from cat_pruning.tuning.recorder import Recorded
from cat_pruning.tuning.replay import Replay
from cat_pruning.tuning.scheduler_matrix import TOLERANCE, scheduler_matrix
from cat_pruning.tuning.tune import fit_schedules
from cat_pruning.tuning.worker import Tuner

# What the rounding of the latents after every step may add up to, relative.
_ROUNDED: Final = {torch.float32: TOLERANCE, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A job: the recordings, the calls that made them, and the budgets to fit schedules for."""

    recorded: Recorded
    configs: tuple[GenerateConfig, ...]
    budgets: tuple[int, ...]
    batch: int


def fit(
    pool: Pool[Tuner],
    recorded: Recorded,
    configs: Sequence[GenerateConfig],
    budgets: Sequence[int],
    batch: int,
    advance: Callable[[int], None],
) -> dict[int, ClosedLoopFit]:
    """The best schedule for each number of full steps; each worker of the pool finds those of some.

    Args:
        pool: its workers run the model.
        recorded: runs of it.
        configs: the calls that made them.
        budgets: numbers of full steps.
        batch: prompts of a call.
        advance: called with the number of steps of one run that were computed.

    Raises:
        SettingsError: the scheduler's steps are not what was recorded; or as `fit_schedules`.
        CatError: as `Pool.run`.
    """
    shares = [tuple(budgets[first :: pool.size]) for first in range(min(pool.size, len(budgets)))]
    jobs = [Fit(recorded=recorded, configs=tuple(configs), budgets=share, batch=batch) for share in shares]
    found: dict[int, ClosedLoopFit] = {}

    def take(job: int, piece: int | dict[int, ClosedLoopFit]) -> None:
        if isinstance(piece, dict):
            found.update(piece)
        else:
            advance(piece)

    pool.run(fit_some, jobs, take)
    return {budget: found[budget] for budget in budgets}


def fit_some(worker: Tuner, job: Fit, tell: Tell) -> None:
    """Tell the numbers of steps that were computed, and at the end the schedules by budget."""
    replay = Replay(worker.pipe, [worker.call(config) for config in job.configs], job.recorded.timesteps)
    matrix, recordings = scheduler_matrix(replay.scheduler), job.recorded.recordings
    recordings.check(matrix, _ROUNDED[worker.pipe.transformer.dtype])
    tell(fit_schedules(replay, recordings, matrix, job.budgets, job.batch, tell))
