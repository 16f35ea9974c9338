from __future__ import annotations

import odes
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from cat_pruning.errors import SettingsError
from cat_pruning.tuning.fit import Target, fit_choices, fit_weights, predicted_error
from cat_pruning.tuning.recordings import Recordings
from cat_pruning.tuning.scheduler_matrix import scheduler_matrix
from cat_pruning.tuning.weights import weight_matrix

STEPS = 10
FULL = (0, 1, 4, 7)


def on_lines(runs: int = 4) -> Recordings:
    """Outputs v_i = p + i · q: a forecast by two of them is exact, 1 + (i − j) / (j − k) and the rest."""
    generator = torch.Generator().manual_seed(3)
    start, base, slope = torch.randn(3, runs, 16, generator=generator)
    outputs = torch.stack([base + step * slope for step in range(STEPS)], dim=1)
    return Recordings(start=start, parts=outputs[:, :, None], final=start - outputs.mean(1))


def curved() -> Recordings:
    return odes.recorded(odes.nonlinear(STEPS), STEPS, runs=6)


@pytest.mark.parametrize("target", Target)
def test_outputs_on_a_line_are_forecast_exactly_by_two_terms(target: Target) -> None:
    gram, matrix = on_lines().grams().mean(0), odes.euler_matrix(STEPS)
    (weights,) = fit_weights(gram, matrix, FULL, terms=2, target=target, ridge=1e-13)
    assert set(weights) == set(range(STEPS)) - set(FULL)
    for step, (first, second) in {2: (0, 1), 3: (0, 1), 5: (1, 4), 6: (1, 4), 8: (4, 7), 9: (4, 7)}.items():
        slope = (step - second) / (second - first)
        assert weights[step] == pytest.approx({first: -slope, second: 1 + slope}, abs=1e-6)
    assert predicted_error(gram, matrix, weight_matrix(FULL, [weights], STEPS)) < 1e-6


def test_one_output_is_scaled_to_the_next_ones() -> None:
    recordings = curved()
    (weights,) = fit_weights(
        recordings.grams().mean(0), odes.euler_matrix(STEPS), FULL, terms=1, target=Target.STEPS, ridge=0.0
    )
    scaled = recordings.parts[:, :, 0] / recordings.norms[:, None, None].float()
    first, second = scaled[:, 4].flatten().double(), scaled[:, 6].flatten().double()
    assert weights[6] == {4: pytest.approx(float(first @ second / (first @ first)), rel=1e-5)}


def test_weights_fitted_to_the_states_bring_the_states_nearest() -> None:
    recordings, matrix = curved(), odes.euler_matrix(STEPS)
    gram = recordings.grams().mean(0)
    choice = torch.tensor([FULL])
    by_steps = fit_choices(gram, matrix, choice, target=Target.STEPS)
    by_states = fit_choices(gram, matrix, choice, target=Target.STATES)
    assert float(by_states.state_errors[0, -1]) < float(by_steps.state_errors[0, -1])
    assert float(by_states.step_errors) >= float(by_steps.step_errors)
    # No other weights of the last interval bring the end nearer.
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = by_states.weights[0].clone()
        other[8:, [1, 4, 7]] += 0.03 * torch.randn(2, 3, generator=generator, dtype=torch.float64)
        assert predicted_error(gram, matrix, other) ** 2 > float(by_states.state_errors[0, -1])


@pytest.mark.parametrize("full", [FULL, (0, 3, 4, 8)])
def test_errors_are_those_of_the_forecasts(full: tuple[int, ...]) -> None:
    recordings, matrix = curved(), odes.euler_matrix(STEPS)
    gram = recordings.grams().mean(0)
    fits = fit_choices(gram, matrix, torch.tensor([full]))
    forecast = torch.einsum("ij,rjd->rid", fits.weights[0], recordings.parts[:, :, 0].double())
    norms = recordings.norms[:, None]
    off = (forecast - recordings.parts[:, :, 0].double()) / norms[..., None]
    assert float(fits.step_errors) == pytest.approx(float(off.square().sum() / recordings.count), rel=1e-6)
    for column, step in enumerate((*full[1:], STEPS)):
        state = -off[:, :step].sum(1) / STEPS
        expected = float(state.square().sum(1).mean())
        assert float(fits.state_errors[0, column]) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert predicted_error(gram, matrix, fits.weights[0]) ** 2 == pytest.approx(float(fits.state_errors[0, -1]))


def test_choices_fitted_together_are_those_fitted_alone() -> None:
    gram, matrix = curved().grams().mean(0), odes.euler_matrix(STEPS)
    choices = torch.tensor([FULL, (0, 2, 3, 9), (0, 1, 2, 3)])
    together = fit_choices(gram, matrix, choices)
    for row, choice in enumerate(choices):
        assert torch.allclose(together.weights[row], fit_choices(gram, matrix, choice[None]).weights[0])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of numpy, about diffusers
def test_a_scheduler_with_memory_is_fitted_to_its_own_states() -> None:
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(STEPS)
    matrix, lines = scheduler_matrix(scheduler), on_lines()
    final = lines.states(matrix, STEPS)
    lines = Recordings(start=lines.start, parts=lines.parts, final=final)
    gram = lines.grams().mean(0)
    (weights,) = fit_weights(gram, matrix, FULL, terms=2, ridge=1e-13)
    assert predicted_error(gram, matrix, weight_matrix(FULL, [weights], STEPS)) < 1e-6
    assert weights[9] == pytest.approx({4: -2 / 3, 7: 5 / 3}, abs=1e-5)


def test_parts_have_weights_of_their_own() -> None:
    recordings, matrix = odes.recorded(odes.guided(STEPS), STEPS, runs=6), odes.euler_matrix(STEPS)
    summed = Recordings(start=recordings.start, parts=recordings.parts.sum(2, keepdim=True), final=recordings.final)
    gram, choice = recordings.grams().mean(0), torch.tensor([FULL])
    for target in Target:
        both = fit_choices(gram, matrix, choice, target=target)
        one = fit_choices(summed.grams().mean(0), matrix, choice, target=target)
        assert float(both.step_errors) < 0.9 * float(one.step_errors)
    weights = fit_weights(gram, matrix, FULL)
    assert len(weights) == 2
    forecast = sum(w * recordings.parts[:, j, q].double() for q in (0, 1) for j, w in weights[q][5].items())
    every = weight_matrix(FULL, weights, STEPS)
    assert torch.allclose(torch.einsum("c,rcd->rd", every[5], recordings.parts.flatten(1, 2).double()), forecast)
    assert predicted_error(gram, matrix, every) ** 2 == pytest.approx(float(both.state_errors[0, -1]))
    # The same weights for both parts are those of the sum.
    alike = fit_weights(summed.grams().mean(0), matrix, FULL) * 2
    assert predicted_error(gram, matrix, weight_matrix(FULL, alike, STEPS)) == pytest.approx(
        predicted_error(summed.grams().mean(0), matrix, weight_matrix(FULL, alike[:1], STEPS)), rel=1e-4
    )


def test_every_step_full_has_no_weights_and_no_error() -> None:
    gram, matrix = curved().grams().mean(0), odes.euler_matrix(STEPS)
    assert fit_weights(gram, matrix, range(STEPS)) == ({},)
    assert predicted_error(gram, matrix, weight_matrix(range(STEPS), [{}], STEPS)) == 0.0


@pytest.mark.parametrize("full", [(), (1, 2), (0, 10), (0, 3, 3), (-1, 0)])
def test_full_steps_outside_the_run_are_refused(full: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="of 10: expected 0 and others up to 9, each once"):
        fit_weights(torch.eye(11, dtype=torch.float64), odes.euler_matrix(STEPS), full)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"a Gram matrix \(9, 9\) for 10 steps: expected 11 rows and columns, or 21 with guidance"
    ):
        fit_weights(torch.eye(9, dtype=torch.float64), odes.euler_matrix(STEPS), FULL)
    with pytest.raises(SettingsError, match="terms=0"):
        fit_weights(torch.eye(11, dtype=torch.float64), odes.euler_matrix(STEPS), FULL, terms=0)
