"""What timestep.onnx and prompt.onnx compute, how often they run, and that it is right for every step and row."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from torch import Tensor

from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.engines.timestep_states import TimestepStates
from cat_pruning.step_io import LATENTS, MAX_TIMESTEPS, SYMBOLIC, TIMESTEP, Part

Make = Callable[..., Any]
Runs = list[tuple[Part, int]]
BATCH = 3
SIZE = (64, 48)
SETTINGS = {"keep_ratio": 0.4, "full_steps": 4, "num_clusters": 6}
NAMES = ["pixart-tiny", "flux-middle", "sd35-tiny"]


@pytest.fixture(params=NAMES)
def engine(models: Make, request: pytest.FixtureRequest) -> OnnxRuntimeStepEngine:
    engine: OnnxRuntimeStepEngine = models(request.param).engines["onnxruntime"]
    return engine


def schedule(engine: OnnxRuntimeStepEngine, count: int) -> list[float]:
    return [float(value) for value in torch.linspace(engine.family.max_timestep, 0.01, count)]


def conditioning(engine: OnnxRuntimeStepEngine) -> dict[str, Tensor]:
    """Every row of its own."""
    dims = engine.family.dims((4, 4), batch=BATCH, text_length=5, num_kept=0)
    shapes = engine.family.input_shapes(dims)
    names = [name for name in engine.inputs[Part.TIMESTEP] if name != TIMESTEP]
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn([int(dim) for dim in shapes[name]], generator=generator) for name in names}


def states(engine: OnnxRuntimeStepEngine, timesteps: list[float], rows: slice = slice(None)) -> tuple[Any, list[int]]:
    """The states of a schedule for some of the rows, and the number of timesteps of each run."""
    symbolic = engine.family.input_shapes(SYMBOLIC)
    per_row = {name for name in conditioning(engine) if SYMBOLIC.batch in symbolic[name]}
    inputs = {name: tensor[rows] if name in per_row else tensor for name, tensor in conditioning(engine).items()}
    runs: list[int] = []
    batch = len(range(BATCH)[rows])

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        runs.append(len(inputs[TIMESTEP]) // batch)
        return engine.run(Part.TIMESTEP, inputs)

    graph = engine.graphs[Part.TIMESTEP]
    reads = {value.name: tuple(value.shape) for value in graph.get_inputs()}
    writes = {value.name: tuple(value.shape) for value in graph.get_outputs()}
    return TimestepStates(run, reads, writes, inputs | {LATENTS: torch.zeros(batch)}, timesteps), runs


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [1]), (10, [10]), (MAX_TIMESTEPS, [64]), (65, [64, 1]), (100, [64, 36])]
)
def test_a_schedule_is_computed_at_once(engine: OnnxRuntimeStepEngine, count: int, expected: list[int]) -> None:
    timesteps = schedule(engine, count)
    known, runs = states(engine, timesteps)
    for timestep in timesteps:
        known.at(timestep)
        known.at(timestep)  # as Heun's second call
    assert runs == expected


def test_every_step_is_as_if_it_were_alone(engine: OnnxRuntimeStepEngine) -> None:
    timesteps = schedule(engine, 100)
    known, _ = states(engine, timesteps)
    seen = []
    for index, timestep in enumerate(timesteps):
        together = known.at(timestep)
        if index not in (0, 1, 37, 63, 64, 99):
            continue
        alone, runs = states(engine, [])
        for name, expected in alone.at(timestep).items():
            assert together[name].is_contiguous()
            assert together[name].shape == expected.shape
            torch.testing.assert_close(together[name], expected, rtol=1e-5, atol=1e-5)
        assert runs == [1]
        seen.append(next(iter(together.values())).clone())
    assert all(not torch.allclose(one, other, atol=1e-3) for one, other in itertools.pairwise(seen))


def test_every_row_is_as_if_it_were_alone(engine: OnnxRuntimeStepEngine) -> None:
    timesteps = schedule(engine, 10)
    known, _ = states(engine, timesteps)
    outputs = {value.name: tuple(value.shape) for value in engine.graphs[Part.TIMESTEP].get_outputs()}
    for row in range(BATCH):
        alone, _ = states(engine, timesteps, slice(row, row + 1))
        for timestep in timesteps:
            for name, expected in alone.at(timestep).items():
                axis = outputs[name].index(SYMBOLIC.batch)
                mine = known.at(timestep)[name].narrow(axis, row, 1)
                torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_an_unexpected_timestep(engine: OnnxRuntimeStepEngine) -> None:
    timesteps = schedule(engine, 10)
    between = (timesteps[4] + timesteps[5]) / 2
    known, runs = states(engine, timesteps)
    for timestep in (*timesteps[:5], between, *timesteps[5:]):
        alone, _ = states(engine, [])
        for name, expected in alone.at(timestep).items():
            torch.testing.assert_close(known.at(timestep)[name], expected, rtol=1e-5, atol=1e-5)
    assert runs == [10, 1, 5]


def test_a_schedule_that_names_a_timestep_twice(engine: OnnxRuntimeStepEngine) -> None:
    first, second, third = schedule(engine, 3)
    known, runs = states(engine, [first, second, second, third, third])
    for timestep in (first, second, second, third, third):
        known.at(timestep)
    assert runs == [3]


@pytest.mark.parametrize("steps", [10, 100])
def test_runs_per_image(models: Make, steps: int, sample: Make, small_graph_runs: Runs) -> None:
    pipe = models("sd35-tiny").drop_in("onnxruntime", **SETTINGS)
    for seed in range(2):
        small_graph_runs.clear()
        sample(pipe, steps, SIZE, seed=seed)
        runs = [steps] if steps <= MAX_TIMESTEPS else [MAX_TIMESTEPS, steps - MAX_TIMESTEPS]
        assert small_graph_runs == [(Part.PROMPT, 0), *((Part.TIMESTEP, count) for count in runs)]


def test_heuns_repeated_timesteps(models: Make, sample: Make, small_graph_runs: Runs) -> None:
    model = models("sd35-tiny")
    scheduler = FlowMatchHeunDiscreteScheduler.from_config(model.parts["scheduler"].config)
    expected = sample(model.pipeline(None, scheduler), 8, SIZE)
    actual = sample(model.drop_in("onnxruntime", scheduler, **SETTINGS | {"keep_ratio": 1.0}), 8, SIZE)
    assert len(actual.calls) == 15
    assert actual.kinds == "FFFFPPPP"
    torch.testing.assert_close(actual.final, expected.final, rtol=0, atol=1e-4)
    assert small_graph_runs == [(Part.PROMPT, 0), (Part.TIMESTEP, 8)]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_prompt_tensors_for_a_new_image(models: Make, name: str, sample: Make, small_graph_runs: Runs) -> None:
    """The pipeline passes the user's tensors on where there is no batch of guidance."""
    model = models(name)
    config, generator = model.transformer.config, torch.Generator().manual_seed(0)
    width = config.caption_channels if name.startswith("pixart") else config.joint_attention_dim
    given: dict[str, Any] = {"prompt_embeds": torch.randn(1, 12, width, generator=generator), "guidance_scale": 1.0}
    if name.startswith("pixart"):
        given["prompt_attention_mask"] = torch.ones(1, 12, dtype=torch.int64)
    else:
        given["pooled_prompt_embeds"] = torch.randn(1, config.pooled_projection_dim, generator=generator)
    pipe = model.drop_in("onnxruntime", **SETTINGS)
    finals = []
    for seed in (0, 1, 0):
        small_graph_runs.clear()
        run = sample(pipe, 6, SIZE, None, seed, **given)
        assert run.kinds == "FFFFPP"
        assert small_graph_runs.count((Part.PROMPT, 0)) == 1
        finals.append(run.final)
    scale = finals[0].std().clamp(min=1.0)
    torch.testing.assert_close(finals[2] / scale, finals[0] / scale, rtol=0, atol=1e-5)
    assert not torch.allclose(finals[1], finals[0])
    given["prompt_embeds"].mul_(-1)  # the same memory with other values
    small_graph_runs.clear()
    assert not torch.allclose(sample(pipe, 6, SIZE, None, 0, **given).final / scale, finals[0] / scale, atol=1e-3)
    assert small_graph_runs.count((Part.PROMPT, 0)) == 1
