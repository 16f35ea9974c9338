"""One batch of every family: the pictures are the pipeline's own, and previews come nearer to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_pipelines import Use, pipeline_of, randn, transformer_of
from numpy.typing import NDArray

from cat_pruning.names import Target
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.serving.config import ServeConfig
from cat_pruning.serving.failures import RequestError
from cat_pruning.serving.model import ServedModel
from cat_pruning.serving.requests import ImageRequest
from cat_pruning.serving.run import Asked, Step, run
from cat_pruning.settings import PruneSettings


def values(image: Any) -> NDArray[np.int16]:
    return np.asarray(image).astype(np.int16)


def errors(previews: list[Any], image: Any) -> list[float]:
    return [float(np.square(values(preview) - values(image)).mean()) for preview in previews]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers
def test_pixart(stored_bundle: Callable[..., Path]) -> None:
    bundle = stored_bundle("pixart-mini", targets=(Target.ONNX,))
    model = ServedModel.load("pixart-mini", bundle, ServeConfig(bundles=(bundle,), engine="onnxruntime"))
    request = ImageRequest(
        prompt="a large red circle on a plain black background",
        size="64x64",
        num_inference_steps=8,
        negative_prompt="a blue star",
        preset="paper",
    )
    previews: list[Any] = []
    asked = Asked(prompt=request.prompts[0], negative_prompt="a blue star", seed=4)
    computed = model.compute(model.job(request), [asked], lambda step: previews.append(step.preview(0)))
    pipe = model._pipe
    pipe.transformer.settings = PruneSettings()
    expected = pipe(
        request.prompt,
        negative_prompt="a blue star",
        height=64,
        width=64,
        num_inference_steps=8,
        guidance_scale=model.default_guidance,
        generator=torch.Generator().manual_seed(4),
        **model._text,
    ).images[0]
    assert np.array_equal(values(computed.images[0]), values(expected))
    assert sum(computed.kinds.values()) == len(previews) == 8
    found = errors(previews, expected)
    assert found[-2] < 0.2 * found[0]


def test_flux() -> None:
    """Packed latents and no negative prompt; of a random tiny model, whose encoders' place embeddings take."""
    use = Use("FluxPipeline", "text to image")
    transformer = CatTransformer.from_model(transformer_of(use, "flux-dev"), PruneSettings())
    pipe = pipeline_of(use, "flux-dev", transformer)
    pipe.encode_prompt = lambda **given: (
        randn(len(given["prompt"]), 7, 24),
        randn(len(given["prompt"]), 20),
        torch.zeros(7, 3),
    )
    arguments = {"height": 32, "width": 32, "num_inference_steps": 6, "guidance_scale": 4.0}
    settings = PruneSettings(full_steps=3, num_clusters=6)
    asked, seen = [Asked(prompt="a", seed=1), Asked(prompt="b", seed=2)], []

    def after_step(step: Step) -> None:
        seen.append((step.record, step.preview(1)))

    computed = run(pipe, settings, asked, 2, arguments, after_step)
    assert [str(record.kind) for record, _ in seen] == ["full"] * 3 + ["pruned"] * 3
    assert len(computed.images) == 2
    assert computed.counts.shape == (2, computed.grid[0] * computed.grid[1])
    assert computed.counts.min() >= 3
    assert computed.counts.max() <= 6
    found = errors([preview for _, preview in seen], computed.images[1])
    assert found[-1] == 0.0  # the last preview is the picture
    assert found[3] < found[0]
    assert transformer.sessions.num_lent == 0


def test_a_model_without_negative_prompts_says_so(served_bundle: Path, loaded: ServedModel) -> None:
    config = ServeConfig(bundles=(served_bundle,))
    model = ServedModel("flux", loaded._pipe, loaded._manifest, {}, config)
    family = type(loaded._family)
    model._family = type("Embedded", (family,), {"batched_guidance": False})(loaded._manifest.transformer_config)
    with pytest.raises(RequestError, match="no negative prompt is taken by flux"):
        model.job(ImageRequest(prompt="x", negative_prompt="y"))


def test_plans_take_what_they_were_built_for(served_bundle: Path, loaded: ServedModel) -> None:
    """Other sizes, batches and guidance are refused, or filled up; as if the engine had plans."""
    profile = loaded._manifest.profiles[0]
    more = profile.model_copy(update={"name": "more", "prompts": 4, "batch": 8})
    manifest = loaded._manifest.model_copy(update={"profiles": (profile, more)})
    model = ServedModel("plans", loaded._pipe, manifest, {}, ServeConfig(bundles=(served_bundle,), max_batch=8))
    model._has_plans = True
    assert model.job(ImageRequest(prompt="x")).most == 4
    for refused, param in (({"size": "64x64"}, "size"), ({"guidance_scale": 1.0}, "guidance_scale")):
        with pytest.raises(RequestError, match="is built for") as raised:
            model.job(ImageRequest(prompt="x", **refused))
        assert raised.value.param == param
    job = model.job(ImageRequest(prompt="x", num_inference_steps=1))
    rows: list[int] = []
    asked = [Asked(prompt="x", seed=seed) for seed in range(2)]
    computed = model.compute(job, asked, lambda step: rows.append(step.record.keep_indices.shape[0]))
    assert rows == [8]  # four prompts and their negatives
    assert len(computed.images) == 2
