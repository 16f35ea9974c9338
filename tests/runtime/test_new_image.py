"""Nothing of one image may reach the next: one after another, broken off, at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from cat_pruning.engines.step_engine import StepEngine

Make = Callable[..., Any]
STEPS = 7
SIZE = (64, 64)
SETTINGS = {"keep_ratio": 0.4, "full_steps": 3, "num_clusters": 6}
OTHER = "a small green square above a large yellow circle on a plain white background"
KINDS = "FFFPPPP"


class Interruption(Exception):
    pass


def assert_same(actual: Any, expected: Any) -> None:
    """The same engine on the same inputs: the same tokens, and the same numbers up to the threads' order of sums."""
    assert actual.kinds == expected.kinds == KINDS
    assert actual.same_tokens_as(expected)
    torch.testing.assert_close(actual.final, expected.final, rtol=0, atol=1e-5)


def break_off_at(step: int) -> Callable[[int], None]:
    def on_step(done: int) -> None:
        if done == step:
            raise Interruption

    return on_step


def embeddings(pipe: Any, prompt: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a pipeline takes instead of prompts; the same memory on every call that is given it."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        encoded = pipe.encode_prompt(prompt, None, None, device="cpu", max_sequence_length=24)
    return {"prompt": None} | {name: tensor.to(dtype) for name, tensor in zip(names, encoded, strict=True)}


@pytest.mark.long
def test_images_one_after_another(engine: StepEngine, drop_in: Make, sample: Make) -> None:
    pipe = drop_in(engine, **SETTINGS)
    for arguments in ({"seed": 0}, {"seed": 1, "prompt": OTHER}, {"seed": 1, "prompt": OTHER}):
        assert_same(
            sample(pipe, STEPS, SIZE, **arguments), sample(drop_in(engine, **SETTINGS), STEPS, SIZE, **arguments)
        )


@pytest.mark.long
def test_other_shapes_after_another(engine: StepEngine, drop_in: Make, sample: Make) -> None:
    pipe = drop_in(engine, **SETTINGS)
    for arguments in (
        {"size": (64, 96)},
        {"size": (96, 64)},  # as many tokens as before
        {"size": (64, 64), "prompt": [OTHER, OTHER], "seed": [1, 2]},
        {"size": (64, 64), "guidance_scale": 1.0},
        {"size": (64, 96)},
    ):
        assert_same(sample(pipe, STEPS, **arguments), sample(drop_in(engine, **SETTINGS), STEPS, **arguments))


@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_after_an_image_that_was_broken_off(engine: StepEngine, step: int, drop_in: Make, sample: Make) -> None:
    pipe = drop_in(engine, **SETTINGS)
    with pytest.raises(Interruption):
        sample(pipe, STEPS, SIZE, seed=5, on_step=break_off_at(step))
    assert_same(sample(pipe, STEPS, SIZE), sample(drop_in(engine, **SETTINGS), STEPS, SIZE))


@pytest.mark.parametrize("step", [0, 2, 4])
def test_same_conditioning_after_an_image_that_was_broken_off(
    engine: StepEngine, step: int, drop_in: Make, sample: Make
) -> None:
    """Without guidance the pipeline passes the user's tensors on, so only the schedule tells the images apart."""
    pipe = drop_in(engine, **SETTINGS)
    arguments = embeddings(pipe, OTHER) | {"guidance_scale": 1.0}
    with pytest.raises(Interruption):
        sample(pipe, STEPS, SIZE, seed=5, on_step=break_off_at(step), **arguments)
    assert_same(sample(pipe, STEPS, SIZE, **arguments), sample(drop_in(engine, **SETTINGS), STEPS, SIZE, **arguments))


@pytest.mark.parametrize("step", [0, 2, 4])
def test_after_an_engine_that_failed(
    engine: StepEngine, step: int, drop_in: Make, sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = drop_in(engine, **SETTINGS)
    session_class = type(engine.session())
    run = session_class._run
    left = [step]

    def failing(session: Any, *arguments: Any) -> Any:
        result = run(session, *arguments)  # the caches are written, the noise is lost
        if left[0] == 0:
            raise Interruption
        left[0] -= 1
        return result

    with monkeypatch.context() as patch:
        patch.setattr(session_class, "_run", failing)
        with pytest.raises(Interruption):
            sample(pipe, STEPS, SIZE, seed=5)
    assert_same(sample(pipe, STEPS, SIZE), sample(drop_in(engine, **SETTINGS), STEPS, SIZE))


@pytest.mark.parametrize("step", [0, 1, 5])
def test_image_to_image_after_a_text_to_image_that_was_broken_off(
    engine: StepEngine, step: int, image_to_image: Any, drop_in: Make, sample: Make
) -> None:
    """With the same conditioning; it starts at a timestep below the one that was reached, so nothing goes up."""
    first = drop_in(engine, **SETTINGS)
    conditioning = embeddings(first, OTHER) | {"guidance_scale": 1.0}
    arguments = conditioning | {"size": SIZE, "image": torch.full((1, 3, *SIZE), 0.3), "strength": 0.7}
    expected = sample(drop_in(engine, image_to_image, **SETTINGS), 10, **arguments)
    with pytest.raises(Interruption):
        sample(first, 10, SIZE, on_step=break_off_at(step), **conditioning)
    assert_same(sample(image_to_image(**first.components), 10, **arguments), expected)


def test_two_threads_at_once(engine: StepEngine, drop_in: Make, pipeline: Make, sample: Make) -> None:
    jobs = [
        {"size": (64, 64), "seed": 3} | embeddings(pipeline(), OTHER),
        {"size": (64, 96), "seed": 4} | embeddings(pipeline(), "a large blue star"),
    ]
    expected = [sample(drop_in(engine, **SETTINGS), STEPS, **job) for job in jobs]
    transformer = drop_in(engine, **SETTINGS).transformer
    barrier = threading.Barrier(2, timeout=60)  # so that they take turns step by step

    def generate(job: dict[str, Any]) -> Any:
        return sample(pipeline(transformer), STEPS, on_step=lambda step: barrier.wait() and None, **job)

    # Hooks of the shared transformer see both threads' calls, so what each thread computed is read off the latents.
    with ThreadPoolExecutor(2) as pool:
        actual = list(pool.map(generate, jobs))
    for mine, alone in zip(actual, expected, strict=True):
        assert alone.kinds == KINDS
        torch.testing.assert_close(mine.final, alone.final, rtol=0, atol=1e-5)


def test_settings_changed_between_two_images(engine: StepEngine, drop_in: Make, sample: Make) -> None:
    pipe = drop_in(engine, **SETTINGS)
    sample(pipe, STEPS, SIZE)
    pipe.transformer.settings = pipe.transformer.settings.replace(keep_ratio=0.6, full_steps=5)
    run = sample(pipe, STEPS, SIZE)
    assert [record.num_kept for record in run.records] == [64] * 5 + [38] * 2


def test_settings_changed_within_an_image_begin_it_anew(engine: StepEngine, drop_in: Make, sample: Make) -> None:
    pipe = drop_in(engine, **SETTINGS)

    def on_step(step: int) -> None:
        if step == 4:
            pipe.transformer.settings = pipe.transformer.settings.replace(keep_ratio=0.6)

    run = sample(pipe, 10, SIZE, on_step=on_step)
    assert run.kinds == "FFFPP" + "FFFPP"


def test_reset_begins_an_image_anew(engine: StepEngine, drop_in: Make, sample: Make) -> None:
    pipe = drop_in(engine, **SETTINGS)
    run = sample(pipe, 10, SIZE, on_step=lambda step: pipe.transformer.reset() if step == 4 else None)
    assert run.kinds == "FFFPP" + "FFFPP"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_of_another_dtype_is_pruned(
    engine: StepEngine, dtype: torch.dtype, drop_in: Make, sample: Make
) -> None:
    """Converted conditioning is new memory on every call; it must not look like a new image."""
    pipe = drop_in(engine, **SETTINGS)
    run = sample(pipe, STEPS, SIZE, **embeddings(pipe, OTHER, dtype))
    assert run.kinds == KINDS
    assert run.final.dtype == dtype
    expected = sample(pipe, STEPS, SIZE, **embeddings(pipe, OTHER))
    correlation = torch.corrcoef(torch.stack([run.final.float().flatten(), expected.final.flatten()]))[0, 1]
    # Not equal: the latents are rounded on every step and other seeds' noise is drawn in fp16; only no nonsense.
    assert torch.isfinite(run.final).all()
    assert correlation > 0.5


@pytest.mark.long
def test_inference_mode_and_outside_of_it(engine: StepEngine, drop_in: Make, sample: Make) -> None:
    pipe = drop_in(engine, **SETTINGS)
    expected = sample(drop_in(engine, **SETTINGS), STEPS, SIZE)
    for _ in range(2):
        with torch.inference_mode():
            assert_same(sample(pipe, STEPS, SIZE), expected)
        assert_same(sample(pipe, STEPS, SIZE), expected)  # over the caches that were allocated under it
