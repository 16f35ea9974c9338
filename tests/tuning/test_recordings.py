from __future__ import annotations

import math

import odes
import pytest
import torch

from cat_pruning.errors import SettingsError
from cat_pruning.tuning.recordings import Recordings, guided_parts


def some(runs: int = 3, steps: int = 6, seed: int = 1) -> Recordings:
    return odes.recorded(odes.nonlinear(steps), steps, runs, seed=seed)


def test_grams_have_the_inner_products_relative_to_the_final_latents() -> None:
    recordings = some()
    grams = recordings.grams()
    assert grams.shape == (3, 7, 7)
    assert grams.dtype == torch.float64
    final = recordings.final.double()
    matrix = odes.euler_matrix(6)
    for run, gram in enumerate(grams):
        assert float(matrix[-1] @ gram @ matrix[-1]) == pytest.approx(1.0, rel=1e-5)
        inner = recordings.parts[run, 2, 0].double() @ recordings.start[run].double()
        assert float(gram[3, 0]) == pytest.approx(float(inner / (final[run] @ final[run])))


def test_states_are_those_of_the_run() -> None:
    recordings = some()
    state = recordings.start
    for step in range(7):
        assert torch.allclose(recordings.states(odes.euler_matrix(6), step), state, atol=1e-5)
        if step < 6:
            state = state - recordings.parts[:, step, 0] / 6
    recordings.check(odes.euler_matrix(6))


def test_guidance_makes_two_parts() -> None:
    recordings = odes.recorded(odes.guided(5), 5, runs=2)
    assert (recordings.num_steps, recordings.num_parts) == (5, 2)
    gram = recordings.grams()[1]
    assert gram.shape == (11, 11)
    inner = recordings.parts[1, 3, 1].double() @ recordings.parts[1, 2, 0].double()
    assert float(gram[1 + 7, 1 + 4]) == pytest.approx(float(inner / recordings.norms[1] ** 2))
    recordings.check(odes.euler_matrix(5))
    negative, positive = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = negative + 4.5 * (positive - negative)
    assert torch.allclose(guided_parts(negative, positive, 4.5).sum(1), expected, atol=1e-5)


def test_runs_are_joined_and_picked() -> None:
    parts = [some(2, seed=1), some(3, seed=2)]
    joined = Recordings.joined(parts)
    assert (joined.count, joined.num_steps) == (5, 6)
    assert torch.equal(joined.some([4, 1]).final, torch.stack([parts[1].final[2], parts[0].final[1]]))
    with pytest.raises(SettingsError, match="recordings of 2 shapes"):
        Recordings.joined([some(2), some(2, steps=5)])
    with pytest.raises(SettingsError, match="recordings of 0 shapes"):
        Recordings.joined([])


def test_another_scheduler_is_found_out() -> None:
    recordings, other = some(), odes.euler_matrix(6)
    other[-1, 3] *= 1.1
    with pytest.raises(SettingsError, match="the scheduler does not lead to what was recorded"):
        recordings.check(other)
    with pytest.raises(SettingsError, match="recordings of 6 steps, a scheduler of 7"):
        recordings.check(odes.euler_matrix(7))


def test_what_is_no_recording_is_refused() -> None:
    start, parts = torch.ones(2, 4), torch.ones(2, 3, 1, 4)
    with pytest.raises(SettingsError, match="there are no recordings"):
        Recordings(start=start[:0], parts=parts[:0], final=start[:0])
    with pytest.raises(SettingsError, match=r"outputs \(2, 3, 1, 5\).* expected \(2, steps, parts, …\)"):
        Recordings(start=start, parts=torch.ones(2, 3, 1, 5), final=start)
    for value in (math.nan, math.inf):
        spoilt = parts.clone()
        spoilt[1, 2, 0, 0] = value
        with pytest.raises(SettingsError, match=r"recordings \[1\] have infinities or NaNs"):
            Recordings(start=start, parts=spoilt, final=start)
    with pytest.raises(SettingsError, match=r"recordings \[0\] end in zeros"):
        Recordings(start=start, parts=parts, final=torch.tensor([[0.0] * 4, [1.0] * 4]))
