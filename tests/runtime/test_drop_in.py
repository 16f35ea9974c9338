"""The drop-in in real pipelines: their kinds, schedulers, guidance, batches and sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.callbacks import SD3CFGCutoffCallback
from torch import Tensor

from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.runtime.selection import kmeans, selection
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.schedule import Schedule

Make = Callable[..., Any]
STEPS = 7
SIZE = (64, 64)  # 64 tokens
SETTINGS = {"keep_ratio": 0.4, "full_steps": 3, "num_clusters": 6}
PROMPTS = [
    "a large red circle left of a small blue star on a plain black background",
    "a small green square above a large yellow circle on a plain white background",
    "a large blue star right of a small red square on a plain black background",
]


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Step by step; sums in another order of latents of order 1."""
    assert len(actual.latents) == len(expected.latents)
    for mine, theirs in zip(actual.latents, expected.latents, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.long
@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_keeping_every_token_changes_nothing(
    engine: StepEngine, scheduler: Any, guidance_scale: float, pipeline: Make, drop_in: Make, sample: Make
) -> None:
    arguments = {"steps": STEPS, "size": (64, 96), "guidance_scale": guidance_scale}
    expected = sample(pipeline(scheduler=scheduler), **arguments)
    actual = sample(drop_in(engine, scheduler=scheduler, **SETTINGS | {"keep_ratio": 1.0}), **arguments)
    assert actual.kinds == "FFFPPPP"
    # Guidance of 7 makes a difference between the two rows' noise up to 13 times larger; one processor gave 1.003e-4.
    assert_close(actual, expected, 1e-4 if guidance_scale == 1.0 else 3e-4)


def test_both_calls_of_a_heun_step_compute_the_same_tokens(engine: StepEngine, drop_in: Make, sample: Make) -> None:
    run = sample(drop_in(engine, scheduler=FlowMatchHeunDiscreteScheduler, **SETTINGS), STEPS, SIZE)
    assert len(run.calls) == 2 * STEPS - 1  # the first noise level has one call
    assert [run.calls.count(record) for record in run.records] == [1] + [2] * (STEPS - 1)
    assert run.kinds == "FFFPPPP"
    assert [record.step for record in run.records] == list(range(STEPS))
    timesteps = [record.timestep for record in run.records]
    assert timesteps == sorted(set(timesteps), reverse=True)


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_guidance_rows_share_the_selection_of_the_conditional_row(
    name: str, mini_engines: dict[str, StepEngine], mini_drop_in: Make, sample: Make
) -> None:
    engine = mini_engines[name]  # whose text moves the tokens' order in four steps, as a random model's does not
    pipe = mini_drop_in(engine, **SETTINGS)
    noise: list[Tensor] = []
    pipe.transformer.register_forward_hook(lambda module, args, result: noise.append(result[0].clone()))
    run = sample(pipe, 4, SIZE)
    relative = engine.family.noise_tokens(noise[2] - noise[1])
    expected = [
        _first_selection(relative[row : row + 1], run.records[3].grid, pipe.transformer.settings) for row in (0, 1)
    ]
    assert not torch.equal(expected[0], expected[1])  # or this test could not tell
    for row in run.records[3].keep_indices:
        assert torch.equal(row, expected[1][0])


def _first_selection(relative: Tensor, grid: tuple[int, int], settings: Any) -> Tensor:
    position = kmeans.position_encoding(*grid, relative.shape[-1])
    features = selection.cluster_features(relative, position, settings.noise_scale)
    clusters = kmeans.kmeans(features, kmeans.initial_tokens(*grid, settings.num_clusters), settings.kmeans_iterations)
    return selection.first_selection(relative, clusters, settings.num_kept(relative.shape[1]), settings)


@pytest.mark.long
@pytest.mark.parametrize(("guidance_scale", "count"), [(1.0, 2), (1.0, 3), (7.0, 3)])
def test_every_prompt_is_generated_as_if_alone(
    engine: StepEngine, guidance_scale: float, count: int, drop_in: Make, sample: Make
) -> None:
    arguments = {"steps": STEPS, "size": SIZE, "guidance_scale": guidance_scale}
    together = sample(drop_in(engine, **SETTINGS), prompt=PROMPTS[:count], seed=list(range(count)), **arguments)
    assert together.kinds == "FFFPPPP"
    num_rows = count * (2 if guidance_scale > 1 else 1)
    assert together.records[-1].keep_indices.shape[0] == num_rows
    selections = set()
    for index, prompt in enumerate(PROMPTS[:count]):
        alone = sample(drop_in(engine, **SETTINGS), prompt=[prompt], seed=[index], **arguments)
        torch.testing.assert_close(together.final[index : index + 1], alone.final, rtol=0, atol=1e-3)
        for both, one in zip(together.records[3:], alone.records[3:], strict=True):
            for row in range(index, num_rows, count):  # [negative; positive]
                assert torch.equal(both.keep_indices[row], one.keep_indices[-1])
        selections.add(tuple(alone.records[-1].keep_indices[-1].tolist()))
    assert len(selections) == count  # each its own


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
def test_every_size_computes_its_share_of_tokens(
    engine: StepEngine, size: tuple[int, int], drop_in: Make, sample: Make
) -> None:
    run = sample(drop_in(engine, **SETTINGS), STEPS, size)
    grid = (size[0] // 8, size[1] // 8)
    assert {record.grid for record in run.records} == {grid}
    assert [record.num_kept for record in run.records] == [grid[0] * grid[1]] * 3 + [int(0.4 * grid[0] * grid[1])] * 4
    for record in run.records:
        for row in record.keep_indices.tolist():
            assert row == sorted(set(row))


def test_image_to_image_that_starts_late_is_never_pruned(
    engine: StepEngine, image_to_image: Any, pipeline: Make, drop_in: Make, sample: Make
) -> None:
    arguments = {"steps": 10, "size": SIZE, "image": _image(SIZE), "strength": 0.3}
    expected = sample(pipeline(None, image_to_image), **arguments)
    actual = sample(drop_in(engine, image_to_image, **SETTINGS), **arguments)
    assert actual.kinds == "FFF"
    assert_close(actual, expected)


def test_image_to_image_with_steps_enough_is_pruned(
    engine: StepEngine, image_to_image: Any, pipeline: Make, drop_in: Make, sample: Make
) -> None:
    arguments = {"steps": 10, "size": SIZE, "image": _image(SIZE), "strength": 0.7}
    expected = sample(pipeline(None, image_to_image), **arguments)
    assert_close(sample(drop_in(engine, image_to_image, **SETTINGS | {"keep_ratio": 1.0}), **arguments), expected)
    pruned = sample(drop_in(engine, image_to_image, **SETTINGS), **arguments)
    assert pruned.kinds == "FFFPPPP"
    assert not torch.allclose(pruned.final, expected.final, atol=1e-3)


def _image(size: tuple[int, int]) -> Tensor:
    rows, columns = (torch.linspace(0, 1, side) for side in size)
    return torch.stack([rows.view(-1, 1).expand(size), columns.expand(size), torch.full(size, 0.5)]).unsqueeze(0)


def test_full_steps_of_a_table_are_full(engine: StepEngine, drop_in: Make, sample: Make) -> None:
    table = Schedule.of(STEPS, (0, 1, 2, 4), pruned=(3, 5, 6))
    by_rule = sample(drop_in(engine, **SETTINGS), STEPS, SIZE)
    run = sample(drop_in(engine, **SETTINGS, schedule=table), STEPS, SIZE)
    assert run.kinds == "FFFPFPP"
    assert torch.equal(run.latents[3], by_rule.latents[3])
    assert not torch.equal(run.latents[4], by_rule.latents[4])


def test_guidance_that_a_callback_cuts_off(engine: StepEngine, drop_in: Make, pipeline: Make) -> None:
    """diffusers' own callback: the batch shrinks to the prompt's rows amid the image, which began anew."""
    kinds: list[str] = []

    def image(pipe: Any) -> Tensor:
        after = SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=5)

        def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            if isinstance(pipe.transformer, CatTransformer) and pipe.transformer.last_step is not None:
                kinds.append(pipe.transformer.last_step.kind.value[0].upper())
            changed: dict[str, Any] = after.callback_fn(pipe, step, timestep, tensors)
            return changed

        result: Tensor = pipe(
            "a large blue star",
            height=64,
            width=64,
            num_inference_steps=9,
            generator=torch.Generator().manual_seed(0),
            max_sequence_length=24,
            output_type="latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents", *after.tensor_inputs],
        ).images
        return result

    expected = image(pipeline())
    whole = image(drop_in(engine, keep_ratio=1.0, full_steps=3, num_clusters=6))
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)
    kinds.clear()
    pruned = image(drop_in(engine, keep_ratio=0.4, full_steps=3, num_clusters=6))
    assert "".join(kinds) == "FFFPPP" + "FPP"
    assert (pruned - expected).norm() < 0.5 * expected.norm()
