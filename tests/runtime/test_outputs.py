"""What steps contribute where they do not compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from torch import Tensor

from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.families import family_of
from cat_pruning.runtime.outputs import Outputs
from cat_pruning.schedule import ScheduledStep, StepKind
from cat_pruning.settings import PruneSettings

KINDS = ["sd3", "pixart", "flux-dev"]
NUM_TOKENS = 12  # 3 x 4
REFRESHED = {"refresh_every": 3, "reuse": "extrapolate"}


EVERY = torch.arange(NUM_TOKENS, dtype=torch.int32).expand(2, -1)


class Made:
    """The outputs of a family's images, which are random."""

    def __init__(self, kind: str, make_tiny: Callable[..., Any]) -> None:
        self.family = family_of(make_tiny(kind))
        self.outputs = Outputs(self.family)
        dims = self.family.dims((3, 4), batch=2, text_length=5, num_kept=0)
        self.shape = [int(size) for size in self.family.noise_shape(dims)]
        generator = torch.Generator().manual_seed(0)
        self.noises = [torch.randn(self.shape, generator=generator) for _ in range(6)]


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, make_tiny: Callable[..., Any]) -> Made:
    return Made(request.param, make_tiny)


def test_the_mask_is_of_the_tokens(made: Made) -> None:
    indices = torch.tensor([[0, 5], [7, 11]], dtype=torch.int32)
    noise = made.noises[0]
    tokens = made.family.noise_tokens(made.family.token_mask(indices, noise).expand(noise.shape))
    for row in range(2):
        assert tokens[row].amin(dim=-1).nonzero().flatten().tolist() == indices[row].tolist()
        assert tokens[row].amax(dim=-1).nonzero().flatten().tolist() == indices[row].tolist()


def test_the_mask_of_no_tokens(made: Made) -> None:
    noise = made.noises[0]
    assert not made.family.token_mask(torch.empty(2, 0, dtype=torch.int32), noise).expand(noise.shape).any()


def test_a_forecast_is_the_weighted_sum(made: Made) -> None:
    for number, noise in enumerate(made.noises[:3]):
        made.outputs.keep(number, noise, last_read=9)
    row = ScheduledStep(kind=StepKind.FORECAST, weights={0: 0.5, 1: -1.25, 2: 2.0})
    output = made.outputs.of(made.noises[2], row, EVERY[:, :0])
    expected = 0.5 * made.noises[0] - 1.25 * made.noises[1] + 2.0 * made.noises[2]
    torch.testing.assert_close(output, expected)


def test_computed_tokens_are_what_was_computed_and_the_others_the_sum(made: Made) -> None:
    made.outputs.keep(0, made.noises[0], last_read=9)
    made.outputs.keep(1, made.noises[1], last_read=9)
    kept = torch.tensor([[2, 7], [0, 11]], dtype=torch.int32)
    row = ScheduledStep(kind=StepKind.PRUNED, weights={0: -1.0, 1: 2.0})
    output = made.outputs.of(made.noises[2], row, kept)
    mask = made.family.token_mask(kept, output).bool().expand_as(output)
    assert torch.equal(output[mask], made.noises[2][mask])
    torch.testing.assert_close(output[~mask], (2.0 * made.noises[1] - made.noises[0])[~mask])


def test_negative_rows_have_weights_of_their_own(made: Made) -> None:
    for number, noise in enumerate(made.noises[:2]):
        made.outputs.keep(number, noise, last_read=9)
    row = ScheduledStep(kind=StepKind.FORECAST, weights={0: -1.0, 1: 2.0}, negative={0: -0.5, 1: 1.5})
    one, other = made.noises[:2]
    output = made.outputs.of(other, row, EVERY[:, :0], torch.tensor([True, False]))
    torch.testing.assert_close(output[0], 1.5 * other[0] - 0.5 * one[0])
    torch.testing.assert_close(output[1], 2.0 * other[1] - one[1])
    assert torch.equal(made.outputs.of(other, row, EVERY[:, :0])[0], (2.0 * other - one)[0])  # without guidance


@pytest.mark.parametrize("kind", StepKind)
def test_without_weights_it_is_what_was_last_computed(made: Made, kind: StepKind) -> None:
    assert made.outputs.of(made.noises[0], ScheduledStep(kind=kind), EVERY[:, :2]) is made.noises[0]


def test_outputs_are_forgotten_when_nothing_reads_them_any_more(made: Made) -> None:
    reads = {number: ScheduledStep(kind=StepKind.FORECAST, weights={number: 1.0}) for number in range(4)}
    for number, last in ((0, 2), (1, math.inf), (2, 2), (3, 5)):
        made.outputs.keep(number, made.noises[number], last)
    assert [made.outputs.has(reads[number]) for number in range(4)] == [False, True, False, True]
    made.outputs.reset()
    assert not made.outputs.has(reads[1])


def test_the_output_of_a_second_call_at_a_timestep_replaces_the_first(made: Made) -> None:
    """Heun's."""
    made.outputs.keep(0, made.noises[0], last_read=9)
    made.outputs.keep(0, made.noises[1], last_read=9)
    row = ScheduledStep(kind=StepKind.FORECAST, weights={0: 1.0})
    assert torch.equal(made.outputs.of(made.noises[2], row, EVERY[:, :0]), made.noises[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_full(made: Made, dtype: torch.dtype) -> None:
    """Large weights of opposite signs, as a line far beyond its points has them, lose nothing but the last rounding."""
    one, other = (noise.to(dtype) for noise in made.noises[:2])
    made.outputs.keep(0, one, last_read=9)
    made.outputs.keep(1, other, last_read=9)
    row = ScheduledStep(kind=StepKind.FORECAST, weights={0: -63.0, 1: 64.0})
    output = made.outputs.of(other, row, EVERY[:, :0])
    assert output.dtype == dtype
    assert torch.equal(output, (one.float() * -63.0 + other.float() * 64.0).to(dtype))


@pytest.mark.long
def test_every_token_kept_is_the_model_itself(engine: StepEngine, drop_in: Any, sample: Any) -> None:
    plain = sample(drop_in(engine, keep_ratio=1.0), 10)
    assert torch.equal(sample(drop_in(engine, keep_ratio=1.0, **REFRESHED), 10).final, plain.final)


@pytest.mark.long
def test_an_image_with_it_is_another(engine: StepEngine, drop_in: Any, sample: Any) -> None:
    repeated, extrapolated = (
        sample(drop_in(engine, **REFRESHED | {"reuse": reuse}), 11) for reuse in ("repeat", "extrapolate")
    )
    assert torch.equal(repeated.latents[7], extrapolated.latents[7])  # full steps are the same
    assert not torch.allclose(repeated.final, extrapolated.final, atol=1e-4)
    again = drop_in(engine, **REFRESHED)
    sample(again, 11, seed=5)
    assert torch.equal(sample(again, 11).final, extrapolated.final)  # nothing is left of the image before


def test_the_forecast_computes_full_steps_only(
    engine: StepEngine, drop_in: Any, sample: Any, computed: list[Tensor]
) -> None:
    """A step between two of them is on the line through the last two; a scheduler that calls twice agrees."""
    settings = PruneSettings.preset("forecast", full_steps=2).to_dict()
    pipe = drop_in(engine, **settings)
    outputs: list[Tensor] = []
    pipe.transformer.register_forward_hook(lambda module, arguments, output: outputs.append(output[0].clone()))
    run = sample(pipe, 10)
    assert run.kinds == "FFF-F-F-F-"
    assert [tokens.shape[1] for tokens in computed] == [256] * run.kinds.count("F")  # the session is not even asked
    assert [record.num_kept for record in run.records] == [0 if kind == "-" else 256 for kind in run.kinds]
    times = [record.timestep for record in run.records]
    for step, before, last in ((3, 1, 2), (5, 2, 4), (7, 4, 6), (9, 6, 8)):
        slope = (outputs[last] - outputs[before]) / (times[last] - times[before])
        expected = outputs[last] + slope * (times[step] - times[last])
        torch.testing.assert_close(outputs[step], expected, rtol=0, atol=1e-5)


def test_a_scheduler_that_calls_twice_is_told_the_same_twice(engine: StepEngine, drop_in: Any, sample: Any) -> None:
    """On a step that computes nothing, Heun's two calls at one timestep are on the same line."""
    settings = PruneSettings.preset("forecast", full_steps=2).to_dict()
    pipe = drop_in(engine, scheduler=FlowMatchHeunDiscreteScheduler, **settings)
    outputs: list[Tensor] = []
    pipe.transformer.register_forward_hook(lambda module, arguments, output: outputs.append(output[0].clone()))
    calls = sample(pipe, 10).calls
    again = [index for index in range(1, len(calls)) if calls[index] is calls[index - 1] and not calls[index].num_kept]
    assert len(again) > 2
    for index in again:
        assert torch.equal(outputs[index], outputs[index - 1])
        assert not torch.equal(outputs[index], outputs[index - 2])
