from __future__ import annotations

import odes
import pytest
import torch
from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.tuning.closed_loop import fit_best, fit_closed_loop, run_closed_loop
from cat_pruning.tuning.fit import Target, fit_weights

STEPS = 16
FULL = (0, 1, 3, 6, 10, 13)
MODEL = odes.nonlinear(STEPS)
MATRIX = odes.euler_matrix(STEPS)


def test_a_fit_in_the_loop_is_better_than_one_on_recordings_alone() -> None:
    model, full = odes.denoising(STEPS), (0, 4, 9, 13)
    recordings, others = (odes.recorded(model, STEPS, runs=16, seed=seed) for seed in (1, 9))
    errors = {}
    for name, weights in {
        "closed": fit_closed_loop(model, recordings, MATRIX, full).weights,
        "open": fit_weights(recordings.grams().mean(0), MATRIX, full),
        "open, each step": fit_weights(recordings.grams().mean(0), MATRIX, full, target=Target.STEPS),
    }.items():
        final = run_closed_loop(model, others.start, MATRIX, full, weights)
        errors[name] = float(((final - others.final).norm(dim=1) / others.norms).mean())
    assert errors["closed"] < 0.85 * min(errors["open"], errors["open, each step"]), errors


def test_the_errors_are_those_of_a_run() -> None:
    recordings = odes.recorded(MODEL, STEPS, runs=5)
    found = fit_closed_loop(MODEL, recordings, MATRIX, FULL)
    final = run_closed_loop(MODEL, recordings.start, MATRIX, FULL, found.weights)
    expected = (final - recordings.final).norm(dim=1) / recordings.norms
    assert torch.allclose(found.errors, expected, atol=1e-5)


def test_a_schedule_s_run_is_the_schedulers() -> None:
    """The states of the matrix are what a loop over the steps makes of the outputs and the forecasts."""
    weights = fit_closed_loop(MODEL, odes.recorded(MODEL, STEPS, runs=5), MATRIX, FULL, terms=2).weights
    (rows,) = weights
    state = start = odes.recorded(MODEL, STEPS, runs=3, seed=4).start
    outputs: list[Tensor] = []
    for step in range(STEPS):
        row = rows.get(step)
        outputs.append(MODEL(step, state)[:, 0] if row is None else sum(w * outputs[read] for read, w in row.items()))  # type: ignore[arg-type]
        state = state - outputs[-1] / STEPS
    assert torch.allclose(run_closed_loop(MODEL, start, MATRIX, FULL, weights), state, atol=1e-5)


def test_parts_have_weights_of_their_own() -> None:
    model, full = odes.guided(STEPS), (0, 1, 4, 9)
    recordings, others = (odes.recorded(model, STEPS, runs=12, seed=seed) for seed in (1, 9))
    found = fit_closed_loop(model, recordings, MATRIX, full)
    final = run_closed_loop(model, recordings.start, MATRIX, full, found.weights)
    assert torch.allclose(found.errors, (final - recordings.final).norm(dim=1) / recordings.norms, atol=1e-5)

    def summed(step: int, states: Tensor) -> Tensor:
        return model(step, states).sum(1, keepdim=True)

    one = fit_closed_loop(summed, odes.recorded(summed, STEPS, runs=12), MATRIX, full).weights
    errors = [
        float((run_closed_loop(made, others.start, MATRIX, full, weights) - others.final).norm())
        for made, weights in ((model, found.weights), (summed, one))
    ]
    assert errors[0] < 0.9 * errors[1], errors


def test_every_step_full_is_the_recorded_run() -> None:
    recordings = odes.recorded(MODEL, STEPS, runs=3)
    found = fit_closed_loop(MODEL, recordings, MATRIX, range(STEPS))
    assert found.weights == ({},)
    assert float(found.errors.max()) < 1e-6


def test_the_model_runs_on_the_full_steps_alone() -> None:
    seen: list[int] = []

    def counting(step: int, states: Tensor) -> Tensor:
        seen.append(step)
        return MODEL(step, states)

    recordings = odes.recorded(MODEL, STEPS, runs=3)
    (weights,) = fit_closed_loop(counting, recordings, MATRIX, FULL, terms=2).weights
    assert seen == list(FULL)
    read = {2: (0, 1), 4: (1, 3), 5: (1, 3), 7: (3, 6), 8: (3, 6), 9: (3, 6)}
    read |= {11: (6, 10), 12: (6, 10), 14: (10, 13), 15: (10, 13)}
    assert {step: tuple(row) for step, row in weights.items()} == read


def test_the_best_choice_is_that_of_the_least_error() -> None:
    seen: list[int] = []

    def counting(step: int, states: Tensor) -> Tensor:
        seen.append(step)
        return MODEL(step, states)

    recordings = odes.recorded(MODEL, STEPS, runs=4)
    choices = [(0, 1, 2, 3, 4), (0, 2, 5, 9, 12), (0, 2, 5, 8, 12)]
    best = fit_best(counting, recordings, MATRIX, choices)
    alone = [fit_closed_loop(MODEL, recordings, MATRIX, choice) for choice in choices]
    least = min(alone, key=lambda fit: float(fit.errors.mean()))
    assert (best.full_steps, best.weights) == (least.full_steps, least.weights)
    assert torch.equal(best.errors, least.errors)
    assert seen == [0, 1, 2, 3, 4, 2, 5, 9, 12, 8, 12]  # what begins alike is evaluated once
    with pytest.raises(SettingsError, match="there is no choice of full steps"):
        fit_best(MODEL, recordings, MATRIX, [])


def test_what_cannot_be_fitted_is_refused() -> None:
    recordings = odes.recorded(MODEL, STEPS, runs=2)
    with pytest.raises(SettingsError, match="recordings of 16 steps, a scheduler of 12"):
        fit_closed_loop(MODEL, recordings, odes.euler_matrix(12), FULL)
    with pytest.raises(SettingsError, match=r"full steps \[1, 3\] of 16"):
        fit_closed_loop(MODEL, recordings, MATRIX, (1, 3))
    with pytest.raises(SettingsError, match="recordings of 48 numbers for 49 weights of a step; record more runs"):
        fit_closed_loop(MODEL, recordings, MATRIX, FULL, terms=49)
    with pytest.raises(SettingsError, match="the model's output on step 0 is not finite"):
        fit_closed_loop(lambda step, states: states / 0, recordings, MATRIX, FULL)
