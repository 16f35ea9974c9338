"""Schedules in real pipelines: rows by timestep, and what they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, StableDiffusion3Img2ImgPipeline
from torch import Tensor

from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.errors import ScheduleError
from cat_pruning.moved_schedule import move
from cat_pruning.schedule import Schedule
from cat_pruning.settings import PruneSettings

Make = Callable[..., Any]
STEPS = 8
SIZE = (64, 64)


@pytest.fixture(scope="module")
def table() -> Schedule:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    weights = {2: {0: -0.5, 1: 1.5}, 4: {1: -0.25, 3: 1.25}, 5: {0: 0.125, 1: -0.25, 3: 1.125}, 7: {3: -1.0, 6: 2.0}}
    return Schedule.of(STEPS, (0, 1, 3, 6), weights, timesteps=tuple(scheduler.timesteps.tolist()))


@pytest.fixture
def outputs() -> list[Tensor]:
    return []


@pytest.fixture
def tuned(engine: StepEngine, drop_in: Make, table: Schedule, outputs: list[Tensor]) -> Make:
    def make(*arguments: Any, **settings: Any) -> Any:
        pipe = drop_in(engine, *arguments, **{"schedule": table, **settings})
        pipe.transformer.register_forward_hook(lambda module, arguments, output: outputs.append(output[0].clone()))
        return pipe

    return make


def test_a_forecast_is_its_row_of_the_table(tuned: Make, sample: Make, table: Schedule, outputs: list[Tensor]) -> None:
    run = sample(tuned(), STEPS, SIZE)
    assert run.kinds == "FF-F--F-"
    for number, row in enumerate(table.steps):
        if row.weights:
            expected = sum(weight * outputs[read] for read, weight in row.weights.items())
            torch.testing.assert_close(outputs[number], expected, rtol=0, atol=1e-5)
    assert [record.num_kept for record in run.records] == [64, 64, 0, 64, 0, 0, 64, 0]


def test_the_next_image_is_a_fresh_one(tuned: Make, sample: Make) -> None:
    pipe = tuned()
    sample(pipe, STEPS, SIZE, seed=5)
    assert torch.equal(sample(pipe, STEPS, SIZE).final, sample(tuned(), STEPS, SIZE).final)


def test_computed_rows_only_are_the_untouched_pipeline(
    tuned: Make, sample: Make, engine: StepEngine, drop_in: Make
) -> None:
    every = sample(tuned(schedule=Schedule.of(STEPS, range(STEPS))), STEPS, SIZE)
    assert torch.equal(every.final, sample(drop_in(engine, keep_ratio=1.0), STEPS, SIZE).final)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_guidance_on_and_off(tuned: Make, sample: Make, guidance_scale: float) -> None:
    assert sample(tuned(), STEPS, SIZE, guidance_scale=guidance_scale).kinds == "FF-F--F-"


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_the_negative_prompt_s_rows_have_their_own_weights(
    tuned: Make, sample: Make, outputs: list[Tensor], guidance_scale: float
) -> None:
    table = Schedule.of(3, (0, 1), {2: {0: -1.0, 1: 2.0}}, {2: {0: -0.5, 1: 1.5}})
    sample(tuned(schedule=table), 3, SIZE, guidance_scale=guidance_scale)
    positive, negative = 2.0 * outputs[1] - outputs[0], 1.5 * outputs[1] - 0.5 * outputs[0]
    torch.testing.assert_close(outputs[2][-1], positive[-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs[2][:-1], negative[:-1], rtol=0, atol=1e-5)


def test_an_image_that_starts_late_goes_by_the_rule(
    tuned: Make, sample: Make, engine: StepEngine, drop_in: Make
) -> None:
    """Half of the table's steps are full, so half of such an image's are, and two more."""
    late = {"image": torch.zeros(1, 3, *SIZE), "strength": 6 / 8}
    pipe = tuned(StableDiffusion3Img2ImgPipeline)
    run = sample(pipe, STEPS, SIZE, **late)
    assert run.kinds == "FFFF-F"
    rule = {"keep_ratio": 0.0, "full_steps": 3, "refresh_every": 2, "reuse": "extrapolate"}
    expected = sample(drop_in(engine, StableDiffusion3Img2ImgPipeline, **rule), STEPS, SIZE, **late)
    assert torch.equal(run.final, expected.final)
    assert sample(pipe, STEPS, SIZE, **late | {"strength": 1.0}).kinds == "FF-F--F-"  # the whole of it again


def test_heun_calls_twice_at_a_row(tuned: Make, sample: Make, table: Schedule, outputs: list[Tensor]) -> None:
    run = sample(tuned(scheduler=FlowMatchHeunDiscreteScheduler), STEPS, SIZE)
    assert len(run.calls) == 2 * STEPS - 1
    assert run.kinds == "FF-F--F-"
    assert [record.step for record in run.records] == list(range(STEPS))


@pytest.mark.parametrize("steps", [7, 9, 16])
def test_another_number_of_steps_is_refused_before_any_is_computed(
    tuned: Make, sample: Make, steps: int, outputs: list[Tensor]
) -> None:
    with pytest.raises(
        ScheduleError, match=rf"8-4 is for the 8 steps at timesteps 1000, .*this run has {steps}"
    ) as caught:
        sample(tuned(), steps, SIZE)
    assert "num_inference_steps=8" in caught.value.remedy
    assert not outputs


def test_at_another_shift_the_schedule_is_moved(
    tuned: Make, sample: Make, table: Schedule, outputs: list[Tensor]
) -> None:
    pipe = tuned()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    run = sample(pipe, STEPS, SIZE)
    moved = move(table, tuple(pipe.scheduler.timesteps.tolist()))
    assert moved.full_steps != table.full_steps
    assert run.kinds == "".join("F" if number in moved.full_steps else "-" for number in range(STEPS))
    for number, row in enumerate(moved.steps):
        if row.weights:
            expected = sum(weight * outputs[read] for read, weight in row.weights.items())
            torch.testing.assert_close(outputs[number], expected, rtol=0, atol=1e-5)


def test_rows_without_timesteps_go_by_their_number(tuned: Make, sample: Make, table: Schedule) -> None:
    by_number = Schedule.of(STEPS, table.full_steps, {n: row.weights for n, row in enumerate(table.steps)})
    assert torch.equal(sample(tuned(schedule=by_number), STEPS, SIZE).final, sample(tuned(), STEPS, SIZE).final)
    with pytest.raises(ScheduleError, match="has 8 steps, this run has more"):
        sample(tuned(schedule=by_number), STEPS + 1, SIZE)


def test_pruned_rows_may_read_outputs_too(tuned: Make, sample: Make, outputs: list[Tensor]) -> None:
    """The tokens that such a row does not compute are its sum."""
    table = Schedule.of(4, (0, 1), {2: {0: -1.0, 1: 2.0}}, pruned=(2, 3))
    run = sample(tuned(schedule=table, keep_ratio=0.25, num_clusters=6), 4, SIZE)
    assert run.kinds == "FFPP"
    expected = 2.0 * outputs[1] - outputs[0]
    same = torch.isclose(outputs[2], expected, rtol=0, atol=1e-5).float().mean()
    assert 0.74 < same < 0.76


def test_it_can_change_between_images(tuned: Make, sample: Make, table: Schedule) -> None:
    pipe = tuned()
    sample(pipe, STEPS, SIZE)
    pipe.transformer.settings = PruneSettings.preset("forecast", full_steps=2)
    assert sample(pipe, STEPS, SIZE).kinds == "FFF-F-F-"
    pipe.transformer.settings = PruneSettings.tuned(table)
    assert sample(pipe, STEPS, SIZE).kinds == "FF-F--F-"
