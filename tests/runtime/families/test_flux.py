"""FLUX: guidance in the model or as a call of its own, timesteps that are no views, few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from torch import Tensor

from cat_pruning.step_io import Part

Make = Callable[..., Any]
Runs = list[tuple[Part, int]]
STEPS = 10
KINDS = "FFFFPPPPPP"
SETTINGS = {"keep_ratio": 0.4, "full_steps": 4, "num_clusters": 6}
SIZE = (64, 48)
PROMPTS = ["a large red circle left of a small blue star", "a small green square"]
TRUE_GUIDANCE = {"true_cfg_scale": 3.0, "negative_prompt": "a large blue star"}
ENGINES = ["torch", "onnxruntime"]


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_guidance_is_an_input_of_the_model(models: Make, engine: str, sample: Make) -> None:
    model = models("flux-middle")
    finals = []
    for scale in (1.0, 6.0):
        expected = sample(model.pipeline(), STEPS, SIZE, guidance_scale=scale)
        actual = sample(model.drop_in(engine, **SETTINGS | {"keep_ratio": 1.0}), STEPS, SIZE, guidance_scale=scale)
        assert {record.keep_indices.shape[0] for record in actual.records} == {1}
        torch.testing.assert_close(actual.final, expected.final, rtol=0, atol=1e-4)
        finals.append(actual.final)
    assert (finals[0] - finals[1]).abs().max() > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_of_one_seed_are_generated_as_if_alone(models: Make, engine: str, sample: Make) -> None:
    model = models("flux-tiny")
    pipe = model.drop_in(engine, **SETTINGS)
    together = sample(pipe, STEPS, SIZE, PROMPTS, [5, 5])
    assert together.kinds == KINDS
    for row, prompt in enumerate(PROMPTS):
        alone = sample(pipe, STEPS, SIZE, [prompt], [5])
        torch.testing.assert_close(together.final[row : row + 1], alone.final, rtol=0, atol=1e-3)
        for both, one in zip(together.records, alone.records, strict=True):
            assert torch.equal(both.keep_indices[row], one.keep_indices[0])
    assert any(not torch.equal(*record.keep_indices) for record in together.records[4:])


def test_rows_of_equal_latents_follow_themselves(models: Make) -> None:
    """Where batches of guidance would follow the last half: the same latents on every call, two texts."""
    model = models("flux-tiny")
    pipe, config = model.drop_in("torch", **SETTINGS), model.transformer.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(6.0))
    arguments = {
        "encoder_hidden_states": torch.randn(2, 9, config.joint_attention_dim, generator=generator),
        "pooled_projections": 4 * torch.randn(2, config.pooled_projection_dim, generator=generator),
        "img_ids": ids,
        "txt_ids": torch.zeros(9, 3),
    }
    for step in range(5):
        latents = torch.randn(1, 48, config.in_channels, generator=generator).repeat(2, 1, 1)
        pipe.transformer(latents, timestep=torch.full((2,), 1 - step / 10), **arguments)
    assert pipe.transformer.last_step.step == 4
    one, other = pipe.transformer.last_step.keep_indices
    assert one.shape == (19,)
    assert not torch.equal(one, other)


def test_the_timesteps_of_the_first_image_are_expected_of_the_second(
    models: Make, sample: Make, small_graph_runs: Runs
) -> None:
    """The pipeline passes timestep / 1000: no view of a schedule, so the first image computes them one by one."""
    pipe = models("flux-middle").drop_in("onnxruntime", **SETTINGS)
    first = sample(pipe, STEPS, SIZE)
    assert small_graph_runs == [(Part.PROMPT, 0), *[(Part.TIMESTEP, 1)] * STEPS]
    small_graph_runs.clear()
    second = sample(pipe, STEPS, SIZE)
    assert small_graph_runs == [(Part.PROMPT, 0), (Part.TIMESTEP, STEPS)]
    assert second.same_tokens_as(first)
    torch.testing.assert_close(second.final, first.final, rtol=0, atol=1e-5)

    small_graph_runs.clear()
    other = sample(pipe, STEPS + 1, SIZE)  # 1 is in both schedules, no other timestep
    assert other.kinds == KINDS + "P"
    assert sum(count for part, count in small_graph_runs if part is Part.TIMESTEP) == 2 * STEPS
    fresh = sample(models("flux-middle").drop_in("onnxruntime", **SETTINGS), STEPS + 1, SIZE)
    torch.testing.assert_close(other.final, fresh.final, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["flux-tiny", "flux-middle"])
def test_true_guidance_keeping_every_token(models: Make, name: str, engine: str, sample: Make) -> None:
    model = models(name)
    expected = sample(model.pipeline(), STEPS, SIZE, PROMPTS, [1, 2], **TRUE_GUIDANCE | _negative(2))
    plain = sample(model.pipeline(), STEPS, SIZE, PROMPTS, [1, 2])
    assert (expected.final - plain.final).abs().max() > 1e-2
    pipe = model.drop_in(engine, **SETTINGS | {"keep_ratio": 1.0})
    actual = sample(pipe, STEPS, SIZE, PROMPTS, [1, 2], **TRUE_GUIDANCE | _negative(2))
    assert len(actual.calls) == 2 * STEPS
    assert actual.kinds == KINDS
    torch.testing.assert_close(actual.final, expected.final, rtol=0, atol=1e-4)


def _negative(count: int) -> dict[str, Any]:
    return {"negative_prompt": [TRUE_GUIDANCE["negative_prompt"]] * count}


@pytest.mark.parametrize("name", ["flux-tiny", "flux-middle"])
def test_true_guidance_is_pruned(
    models: Make, name: str, sample: Make, computed: list[Tensor], small_graph_runs: Runs
) -> None:
    model = models(name)
    runs = []
    for engine in ENGINES:
        pipe = model.drop_in(engine, **SETTINGS)
        computed.clear()
        runs.append(sample(pipe, STEPS, SIZE, **TRUE_GUIDANCE))
        prompts, negatives = computed[::2], computed[1::2]
        assert [tokens.shape[1] for tokens in prompts] == [48] * 4 + [19] * 6
        assert all(torch.equal(one, other) for one, other in zip(prompts, negatives, strict=True))
        assert runs[-1].kinds == KINDS
        assert [record.step for record in runs[-1].records] == list(range(STEPS))
    assert runs[0].same_tokens_as(runs[1])
    torch.testing.assert_close(runs[1].final, runs[0].final, rtol=0, atol=1e-3)
    full = sample(model.pipeline(), STEPS, SIZE, **TRUE_GUIDANCE)
    assert (runs[0].final - full.final).abs().max() > 1e-2

    small_graph_runs.clear()
    again = sample(pipe, STEPS, SIZE, **TRUE_GUIDANCE)  # ONNX Runtime's, a second image
    assert again.same_tokens_as(runs[1])
    torch.testing.assert_close(again.final, runs[1].final, rtol=0, atol=1e-5)
    assert sorted(small_graph_runs) == [(Part.PROMPT, 0)] * 2 + [(Part.TIMESTEP, STEPS)] * 2


@pytest.mark.parametrize("engine", ENGINES)
def test_true_guidance_of_a_pipeline_that_names_no_context(
    models: Make, engine: str, sample: Make, computed: list[Tensor]
) -> None:
    """FluxImg2ImgPipeline calls the model twice per step, and does not say which call is which."""
    model = models("flux-tiny")
    arguments = {"image": torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0)), "strength": 1.0}
    arguments |= TRUE_GUIDANCE
    expected = sample(model.pipeline(None, None, FluxImg2ImgPipeline), STEPS, SIZE, **arguments)
    pipe = model.drop_in(engine, None, FluxImg2ImgPipeline, **SETTINGS | {"keep_ratio": 1.0})
    actual = sample(pipe, STEPS, SIZE, **arguments)
    assert len(actual.calls) == 2 * STEPS
    torch.testing.assert_close(actual.final, expected.final, rtol=0, atol=1e-4)

    pipe = model.drop_in(engine, None, FluxImg2ImgPipeline, **SETTINGS)
    for _ in range(2):  # a second image begins anew
        computed.clear()
        run = sample(pipe, STEPS, SIZE, **arguments)
        assert run.kinds == KINDS
        prompts, negatives = computed[::2], computed[1::2]
        assert [tokens.shape[1] for tokens in prompts] == [48] * 4 + [19] * 6
        assert all(torch.equal(one, other) for one, other in zip(prompts, negatives, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_images_of_one_step(models: Make, engine: str, sample: Make) -> None:
    """Each is at the timestep of the one before, with another prompt: as a second call of its step would be."""
    model = models("flux-tiny")
    pipe = model.drop_in(engine, **SETTINGS)
    for prompt in (*PROMPTS, PROMPTS[0]):
        expected = sample(model.pipeline(), 1, SIZE, prompt)
        torch.testing.assert_close(sample(pipe, 1, SIZE, prompt).final, expected.final, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_four_steps_are_never_pruned(models: Make, engine: str, sample: Make) -> None:
    """FLUX.1-schnell at the default settings."""
    model = models("flux-tiny")
    expected = sample(model.pipeline(), 4, (96, 96))
    actual = sample(model.drop_in(engine), 4, (96, 96))
    assert actual.kinds == "FFFF"
    torch.testing.assert_close(actual.final, expected.final, rtol=0, atol=0 if engine == "torch" else 1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_image_to_image(models: Make, engine: str, sample: Make) -> None:
    model = models("flux-middle")
    arguments = {"image": torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0)), "strength": 0.7}
    expected = sample(model.pipeline(pipeline_class=FluxImg2ImgPipeline), 12, SIZE, **arguments)
    every = model.drop_in(engine, pipeline_class=FluxImg2ImgPipeline, **SETTINGS | {"keep_ratio": 1.0})
    torch.testing.assert_close(sample(every, 12, SIZE, **arguments).final, expected.final, rtol=0, atol=1e-4)
    pruned = sample(model.drop_in(engine, pipeline_class=FluxImg2ImgPipeline, **SETTINGS), 12, SIZE, **arguments)
    assert pruned.kinds == "FFFFPPPPP"  # 9 of the 12
    assert (pruned.final - expected.final).abs().max() > 1e-2
    weak = arguments | {"strength": 0.3}
    expected = sample(model.pipeline(pipeline_class=FluxImg2ImgPipeline), 12, SIZE, **weak)
    unpruned = sample(model.drop_in(engine, pipeline_class=FluxImg2ImgPipeline, **SETTINGS), 12, SIZE, **weak)
    assert unpruned.kinds == "FFFF"
    torch.testing.assert_close(unpruned.final, expected.final, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("sigmas", "tokens"),
    [
        ([1.0, 0.8, 0.8, 0.6, 0.4, 0.2], [48, 48, 48, 19, 19, 19]),  # twice the same: one step, as Heun's two calls
        ([0.2, 0.4, 0.6, 0.8, 1.0], [48] * 5),  # rising: every one begins an image
        ([1.0, 0.5, 0.7, 0.3, 0.1], [48, 48, 48, 48, 19]),  # turns back once
    ],
)
def test_unusual_sigmas(
    models: Make, sample: Make, computed: list[Tensor], sigmas: list[float], tokens: list[int]
) -> None:
    model, steps = models("flux-tiny"), len(sigmas)
    expected = sample(model.pipeline(), steps, SIZE, sigmas=sigmas)
    settings = SETTINGS | {"full_steps": 2}
    whole = sample(model.drop_in("torch", **settings | {"keep_ratio": 1.0}), steps, SIZE, sigmas=sigmas)
    assert torch.equal(whole.final, expected.final)
    computed.clear()
    sample(model.drop_in("torch", **settings), steps, SIZE, sigmas=sigmas)
    assert [chosen.shape[1] for chosen in computed] == tokens


def test_a_negative_prompt_that_is_the_prompt(models: Make, sample: Make, computed: list[Tensor]) -> None:
    """The very same tensors: without a context the second call looks like Heun's, and is computed again."""
    model = models("flux-tiny")
    with torch.no_grad():
        embeds, pooled, _ = model.pipeline().encode_prompt(PROMPTS[0], None, device="cpu", max_sequence_length=24)
    arguments = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "true_cfg_scale": 3.0}
    arguments |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled, "strength": 1.0}
    arguments["image"] = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    expected = sample(model.pipeline(None, None, FluxImg2ImgPipeline), STEPS, SIZE, **arguments)
    whole = model.drop_in("torch", None, FluxImg2ImgPipeline, **SETTINGS | {"keep_ratio": 1.0})
    assert torch.equal(sample(whole, STEPS, SIZE, **arguments).final, expected.final)
    computed.clear()
    run = sample(model.drop_in("torch", None, FluxImg2ImgPipeline, **SETTINGS), STEPS, SIZE, **arguments)
    assert run.kinds == KINDS
    assert [chosen.shape[1] for chosen in computed] == [48] * 8 + [19] * 12


def test_handles_in_turn(models: Make) -> None:
    """ONNX Runtime's sessions and torch's, by handles: as if alone."""
    model = models("flux-tiny")
    generator = torch.Generator().manual_seed(0)
    config = model.transformer.config
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(3.0), indexing="ij"), -1)
    prompts = [
        {
            "encoder_hidden_states": torch.randn(1, 8, config.joint_attention_dim, generator=generator),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
            "txt_ids": torch.zeros(8, 3),
            "img_ids": ids.view(-1, 3),
        }
        for _ in range(3)
    ]
    starts = [torch.randn(1, 12, config.in_channels, generator=generator) for _ in range(3)]

    def images(transformer: Any, numbers: list[int]) -> list[Tensor]:
        handles, latents = {number: transformer.image() for number in numbers}, dict(enumerate(starts))
        for timestep in torch.linspace(1, 0.1, 6):
            for number, image in handles.items():
                with torch.no_grad():
                    noise = image(latents[number], timestep=timestep.expand(1), **prompts[number]).sample
                latents[number] = latents[number] - noise / 6
        for image in handles.values():
            assert image.last_step.num_kept == 4
            image.close()
        return [latents[number] for number in numbers]

    for engine, tolerance in (("torch", 0.0), ("onnxruntime", 1e-5)):
        transformer = model.drop_in(engine, keep_ratio=0.4, full_steps=2, num_clusters=3).transformer
        together = images(transformer, [0, 1, 2])
        alone = [images(transformer, [number])[0] for number in range(3)]
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
        assert transformer.sessions.num_sessions == 3
