"""What unkept tokens contribute under `Reuse.EXTRAPOLATE`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from torch import Tensor

from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.families import family_of
from cat_pruning.runtime.extrapolation import Extrapolation
from cat_pruning.settings import PruneSettings

KINDS = ["sd3", "pixart", "flux-dev"]
NUM_TOKENS = 12  # 3 x 4


class Line:
    """Tokens whose output is a line along the timestep, each with a slope of its own; unkept ones stay behind."""

    def __init__(self, kind: str, make_tiny: Callable[..., Any]) -> None:
        transformer = make_tiny(kind)
        self.family = family_of(transformer)
        self.extrapolation = Extrapolation(self.family)
        dims = self.family.dims((3, 4), batch=2, text_length=5, num_kept=0)
        shape = [int(size) for size in self.family.noise_shape(dims)]
        generator = torch.Generator().manual_seed(0)
        self.offset, self.slope = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        self.noise = torch.zeros(shape)

    def exact(self, timestep: float) -> Tensor:
        return (self.offset + self.slope * timestep / 1000).float()

    def step(self, timestep: float, kept: list[int]) -> Tensor:
        indices = torch.tensor([kept, kept], dtype=torch.int32)
        mask = self.family.token_mask(indices, self.noise).bool()
        self.noise = torch.where(mask, self.exact(timestep), self.noise)
        return self.extrapolation(self.noise, timestep, indices)


EVERY = list(range(NUM_TOKENS))


@pytest.fixture(params=KINDS)
def line(request: pytest.FixtureRequest, make_tiny: Callable[..., Any]) -> Line:
    return Line(request.param, make_tiny)


def test_the_mask_is_of_the_tokens(line: Line) -> None:
    indices = torch.tensor([[0, 5], [7, 11]], dtype=torch.int32)
    mask = line.family.token_mask(indices, line.noise).expand(line.noise.shape)
    tokens = line.family.noise_tokens(mask)
    for row in range(2):
        assert tokens[row].amin(dim=-1).nonzero().flatten().tolist() == indices[row].tolist()
        assert tokens[row].amax(dim=-1).nonzero().flatten().tolist() == indices[row].tolist()


def test_the_mask_of_no_tokens(line: Line) -> None:
    mask = line.family.token_mask(torch.empty(2, 0, dtype=torch.int32), line.noise)
    assert not mask.expand(line.noise.shape).any()


def test_a_line_is_continued_exactly(line: Line) -> None:
    """After two full steps, tokens that were left alone for one, two and three steps."""
    line.step(1000, EVERY)
    for timestep, kept in ((950, EVERY), (900, [0, 1]), (840, [1, 2, 3]), (700, [4]), (670, []), (650, [0, 4])):
        predicted = line.step(timestep, kept)
        assert torch.allclose(predicted, line.exact(timestep), atol=1e-5)


def test_the_first_step_is_what_was_computed(line: Line) -> None:
    assert torch.equal(line.step(1000, EVERY), line.noise)


def test_computed_tokens_are_what_was_computed(line: Line) -> None:
    line.step(1000, EVERY)
    line.step(900, EVERY)
    predicted = line.step(800, [2, 7])
    mask = line.family.token_mask(torch.tensor([[2, 7]] * 2), line.noise).bool()
    assert torch.equal(predicted[mask.expand_as(predicted)], line.noise[mask.expand_as(predicted)])


def test_a_second_call_at_one_timestep_leaves_the_slope(line: Line) -> None:
    """Heun's."""
    line.step(1000, EVERY)
    line.step(900, EVERY)
    line.step(900, EVERY)
    assert torch.allclose(line.step(800, [0]), line.exact(800), atol=1e-5)


def test_another_image_starts_anew(line: Line) -> None:
    line.step(1000, EVERY)
    line.step(900, EVERY)
    line.extrapolation.reset()
    assert torch.equal(line.step(1000, EVERY), line.noise)


def test_half_precision_stays(line: Line) -> None:
    noise = line.exact(900).half()
    indices = torch.arange(NUM_TOKENS, dtype=torch.int32).expand(2, -1)
    for timestep in (1000.0, 900.0):
        assert line.extrapolation(noise, timestep, indices).dtype == torch.float16


@pytest.mark.long
def test_every_token_kept_is_the_model_itself(engine: StepEngine, drop_in: Any, sample: Any) -> None:
    plain = sample(drop_in(engine, keep_ratio=1.0), 10)
    assert torch.equal(sample(drop_in(engine, keep_ratio=1.0, reuse="extrapolate"), 10).final, plain.final)


@pytest.mark.long
def test_an_image_with_it_is_another(engine: StepEngine, drop_in: Any, sample: Any) -> None:
    repeated, extrapolated = (sample(drop_in(engine, reuse=reuse), 11) for reuse in ("repeat", "extrapolate"))
    assert torch.equal(repeated.latents[7], extrapolated.latents[7])  # full steps are the same
    assert not torch.allclose(repeated.final, extrapolated.final, atol=1e-4)
    again = drop_in(engine, reuse="extrapolate")
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
    assert run.kinds == "FFFPFPFPFP"
    assert [tokens.shape[1] for tokens in computed] == [0 if kind == "P" else 256 for kind in run.kinds]
    assert [record.num_kept for record in run.records] == [tokens.shape[1] for tokens in computed]
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
