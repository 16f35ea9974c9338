"""PixArt: its schedulers, its masks, and a selection that goes by the mean."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)

from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings

Make = Callable[..., Any]
STEPS = 10
KINDS = "FFFFPPPPPP"
SETTINGS = {"keep_ratio": 0.4, "full_steps": 4, "num_clusters": 6}
SIZE = (64, 48)


@pytest.fixture
def schedulers(models: Make) -> dict[str, Any]:
    default = models("pixart-tiny").parts["scheduler"]
    assert isinstance(default, DPMSolverMultistepScheduler)
    return {
        "DPM": default,
        "Euler with Karras' noise levels": EulerDiscreteScheduler.from_config(default.config, use_karras_sigmas=True),
    }


@pytest.mark.parametrize("name", ["DPM", "Euler with Karras' noise levels"])
def test_schedulers(models: Make, schedulers: dict[str, Any], name: str, sample: Make) -> None:
    """DPM's timesteps are integers; Euler's with Karras' levels are none, and the latents are scaled by the step."""
    model, scheduler = models("pixart-tiny"), schedulers[name]
    expected = sample(model.pipeline(None, scheduler), STEPS, SIZE)
    scale = expected.final.std().clamp(min=1.0)
    for engine in model.engines:
        actual = sample(model.drop_in(engine, scheduler, **SETTINGS | {"keep_ratio": 1.0}), STEPS, SIZE)
        assert actual.kinds == KINDS
        torch.testing.assert_close(actual.final / scale, expected.final / scale, rtol=0, atol=1e-4)
    in_torch, in_onnx = (sample(model.drop_in(each, scheduler, **SETTINGS), STEPS, SIZE) for each in model.engines)
    assert in_torch.kinds == KINDS
    assert in_onnx.same_tokens_as(in_torch)
    torch.testing.assert_close(in_onnx.final / scale, in_torch.final / scale, rtol=0, atol=1e-3)
    timesteps = [record.timestep for record in in_torch.records]
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert all(value.is_integer() for value in timesteps) == (name == "DPM")


def test_guidance_rows_share_a_selection(models: Make, sample: Make) -> None:
    """Euler scales the latents before the transformer sees them, both halves alike."""
    scheduler = EulerDiscreteScheduler.from_config(models("pixart-tiny").parts["scheduler"].config)
    pipe = models("pixart-tiny").drop_in("onnxruntime", scheduler, **SETTINGS)
    negative, positive = sample(pipe, STEPS, SIZE).records[-1].keep_indices
    assert torch.equal(negative, positive)
    one, other = (
        sample(pipe, STEPS, SIZE, ["a star", "a red circle"], [0, 1], guidance_scale=1.0).records[-1].keep_indices
    )
    assert not torch.equal(one, other)


@pytest.mark.parametrize("part", ["mean", "variance"])
def test_the_selection_goes_by_the_mean_channels(models: Make, part: str, sample: Make) -> None:
    model = models("pixart-tiny")
    changed = copy.deepcopy(model.transformer)
    channels = changed.config.in_channels
    # proj_out's rows are patch row, patch column, channel; the mean's channels come first.
    is_mean = torch.arange(changed.proj_out.out_features) % changed.config.out_channels < channels
    rows = is_mean if part == "mean" else ~is_mean
    changed.proj_out.weight[rows] = changed.proj_out.weight[rows].roll(1, dims=1) * 2

    runs, noises = [], []
    for transformer in (model.transformer, changed):
        pipe = model.pipeline(CatTransformer(TorchStepEngine(transformer), PruneSettings(**SETTINGS)))
        pipe.transformer.register_forward_hook(lambda module, args, result: noises.append(result[0]))
        runs.append(sample(pipe, STEPS, SIZE))
    first, other = noises[0], noises[STEPS]
    assert torch.equal(first[:, :channels], other[:, :channels]) == (part == "variance")
    assert torch.equal(first[:, channels:], other[:, channels:]) == (part == "mean")
    assert runs[0].kinds == runs[1].kinds == KINDS
    assert runs[0].same_tokens_as(runs[1]) == (part == "variance")
    assert torch.equal(runs[0].final, runs[1].final) == (part == "variance")


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_masked_text_does_not_count(models: Make, engine: str, sample: Make) -> None:
    model = models("pixart-tiny")
    pipe = model.drop_in(engine, **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, 12, model.transformer.config.caption_channels, generator=generator)
    mask = torch.tensor([[1] * 5 + [0] * 7])
    finals = []
    for text, text_mask in (
        (embeddings, mask),
        (torch.cat([embeddings[:, :5], -embeddings[:, 5:]], dim=1), mask),
        (embeddings, torch.ones_like(mask)),
    ):
        arguments = {"prompt_embeds": text, "prompt_attention_mask": text_mask, "guidance_scale": 1.0}
        run = sample(pipe, STEPS, SIZE, None, **arguments)
        assert run.kinds == KINDS
        finals.append(run.final)
    assert torch.equal(finals[0], finals[1])
    assert not torch.allclose(finals[0], finals[2], rtol=1e-3)


def test_the_sizes_that_pixart_alpha_is_told(models: Make, sample: Make) -> None:
    """At 1024 x 1024 it is conditioned on resolution and aspect ratio; the pipeline nests them in a dictionary."""
    model = models("pixart-tiny")
    changes = {"sample_size": 128, "use_additional_conditions": True, "cross_attention_dim": 48}
    config = dict(model.transformer.config) | changes | {"num_attention_heads": 6}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = PixArtTransformer2DModel.from_config(config).eval().requires_grad_(False)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    runs = [
        sample(model.pipeline(each, pipeline_class=PixArtAlphaPipeline), STEPS, SIZE)
        for each in (transformer, CatTransformer.from_model(transformer, PruneSettings(**SETTINGS | {"keep_ratio": 1})))
    ]
    assert runs[1].kinds == KINDS
    assert torch.equal(runs[0].final, runs[1].final)
