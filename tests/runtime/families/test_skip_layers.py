"""Skip-layer guidance of SD3.5: a third call per step, without some blocks, for the positive rows only."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import SettingsError
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part

Make = Callable[..., Any]
STEPS = 10
KINDS = "FFFFPPPPPP"
SETTINGS = {"keep_ratio": 0.3, "full_steps": 4, "num_clusters": 6}
SIZE = (64, 48)  # 48 tokens
SKIPPING = {
    "skip_guidance_layers": [1],
    "skip_layer_guidance_start": 0.01,
    "skip_layer_guidance_stop": 0.9,
    "skip_layer_guidance_scale": 2.8,
}
BESIDE = 8  # of 10 steps, 1 to 8 call the model beside
PROMPTS = ["a large red circle left of a small blue star", "a small green square"]
ENGINES = ["torch", "onnxruntime"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "arguments", "engine"),
    [
        *(("sd35-tiny", {}, engine) for engine in ENGINES),
        ("sd35-middle", {}, "torch"),
        ("sd35-middle", {"prompt": PROMPTS, "seed": [1, 2]}, "torch"),
        ("sd35-middle", {"skip_guidance_layers": [0, 2]}, "torch"),
    ],
)
def test_keeping_every_token_is_the_untouched_pipeline(
    models: Make, name: str, arguments: dict[str, Any], engine: str, sample: Make
) -> None:
    model, arguments = models(name), SKIPPING | arguments
    expected = sample(model.pipeline(), STEPS, SIZE, **arguments)
    actual = sample(model.drop_in(engine, **SETTINGS | {"keep_ratio": 1.0}), STEPS, SIZE, **arguments)
    assert actual.kinds == KINDS
    assert len(actual.calls) == STEPS + BESIDE
    for mine, theirs in zip(actual.latents, expected.latents, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    without = sample(model.pipeline(), STEPS, SIZE, prompt=arguments.get("prompt", PROMPTS[0]), seed=[1, 2])
    assert without.final.shape != expected.final.shape or (without.final - expected.final).abs().max() > 1e-2


def test_the_engines_agree_on_pruned_steps(models: Make, sample: Make) -> None:
    model = models("sd35-tiny")
    runs = [sample(model.drop_in(engine, **SETTINGS), STEPS, SIZE, **SKIPPING) for engine in ENGINES]
    for run in runs:
        assert run.kinds == KINDS
        assert [record.step for record in run.records] == list(range(STEPS))
        assert [record.num_kept for record in run.records] == [48] * 4 + [14] * 6
        assert len(run.calls) == STEPS + BESIDE
    assert runs[1].same_tokens_as(runs[0])
    torch.testing.assert_close(runs[1].final, runs[0].final, rtol=0, atol=1e-3)
    full = sample(model.pipeline(), STEPS, SIZE, **SKIPPING)
    assert (runs[0].final - full.final).abs().max() > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("start", "stop", "kept"),
    [
        (0.01, 0.9, [48] * 3 + [14] * 5),  # beside the steps 1 to 8
        (0.55, 0.9, [48, 14, 14]),  # 6 to 8: every token on its first call
    ],
)
def test_the_branch_computes_the_tokens_of_the_image(
    models: Make, engine: str, start: float, stop: float, kept: list[int], sample: Make, computed: list[Tensor]
) -> None:
    pipe = models("sd35-tiny").drop_in(engine, **SETTINGS)
    arguments = SKIPPING | {"skip_layer_guidance_start": start, "skip_layer_guidance_stop": stop}
    for _ in range(2):  # a new image begins the branch anew
        computed.clear()
        assert sample(pipe, STEPS, SIZE, **arguments).kinds == KINDS
        assert [indices.shape[1] for indices in computed if len(indices) == 2] == [48] * 4 + [14] * 6
        assert [indices.shape[1] for indices in computed if len(indices) == 1] == kept
        for image, branch in itertools.pairwise(computed):
            if len(branch) == 1 and branch.shape[1] == 14:
                assert torch.equal(image[1:], branch)


@pytest.mark.parametrize("engine", ENGINES)
def test_images_one_after_another(models: Make, engine: str, sample: Make) -> None:
    pipe = models("sd35-tiny").drop_in(engine, **SETTINGS)
    for arguments in (SKIPPING, SKIPPING | {"prompt": PROMPTS[1], "seed": 3}, {}, SKIPPING):
        run = sample(pipe, STEPS, SIZE, **arguments)
        alone = sample(models("sd35-tiny").drop_in(engine, **SETTINGS), STEPS, SIZE, **arguments)
        assert run.kinds == KINDS
        assert run.same_tokens_as(alone)
        torch.testing.assert_close(run.final, alone.final, rtol=0, atol=1e-5)


def test_the_small_graphs_run_once_for_the_image_and_once_for_the_branch(
    models: Make, sample: Make, small_graph_runs: list[tuple[Part, int]]
) -> None:
    pipe = models("sd35-tiny").drop_in("onnxruntime", **SETTINGS)
    for _ in range(2):
        small_graph_runs.clear()
        sample(pipe, STEPS, SIZE, **SKIPPING)
        assert small_graph_runs == [
            (Part.PROMPT, 0),
            (Part.TIMESTEP, STEPS),
            (Part.PROMPT, 0),
            (Part.TIMESTEP, STEPS - 1),  # from the branch's first step on
        ]


@pytest.mark.parametrize("engine", ENGINES)
def test_skipping_nothing_is_a_call_beside_too(models: Make, engine: str, sample: Make) -> None:
    run = sample(
        models("sd35-tiny").drop_in(engine, **SETTINGS), STEPS, SIZE, **SKIPPING | {"skip_guidance_layers": []}
    )
    assert run.kinds == KINDS
    assert len(run.calls) == STEPS + BESIDE


def test_other_layers_take_the_same_caches(models: Make, sample: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("sd35-middle")
    engine, made = model.engines["torch"], []
    make = engine.session
    monkeypatch.setattr(engine, "session", lambda: made.append(make()) or made[-1])
    pipe = model.drop_in("torch", **SETTINGS)
    for layers in ([0], [1], [0, 2]):
        arguments = SKIPPING | {"skip_guidance_layers": layers}
        run = sample(pipe, STEPS, SIZE, **arguments)
        fresh = CatTransformer(TorchStepEngine(model.transformer), PruneSettings(**SETTINGS))
        assert torch.equal(run.final, sample(model.pipeline(fresh), STEPS, SIZE, **arguments).final)
    assert len(made) == 2  # the image's and the branch's


def test_layers_that_are_no_list(models: Make) -> None:
    pipe = models("sd35-tiny").drop_in("torch", **SETTINGS)
    with pytest.raises(SettingsError, match="skip_layers: expected a list of blocks, got 1"):
        pipe.transformer(torch.zeros(1, 4, 8, 8), timestep=torch.tensor([1.0]), skip_layers=1)
