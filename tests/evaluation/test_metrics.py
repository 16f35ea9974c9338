import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cat_pruning.errors import InstallationError, SettingsError, ShapeError
from cat_pruning.evaluation import metrics as metrics_module
from cat_pruning.evaluation.coverage import coverage
from cat_pruning.evaluation.metrics import Metric, Metrics, Sample
from cat_pruning.models.prompts import Prompt, parse_caption
from cat_pruning.models.scenes import render
from cat_pruning.tools.pictures import psnr_db

CAPTIONS = (
    "a large red circle left of a small blue star on a plain black background",
    "a large purple cross on the right on a striped gray background",
)
PROMPTS = [Prompt(text=caption, scene=parse_caption(caption)) for caption in CAPTIONS]
WITHOUT_CLIP = (Metric.PSNR, Metric.SSIM, Metric.LATENTS, Metric.COVERAGE)


def noisy(image, strength, seed=0):
    noise = np.random.default_rng(seed).normal(0, strength, (128, 128, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


@pytest.fixture
def full():
    images = [Image.fromarray(render(prompt.scene)) for prompt in PROMPTS]
    return Sample(images=images, latents=torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def pruned(full):
    images = [noisy(image, strength) for image, strength in zip(full.images, (5, 40), strict=True)]
    return Sample(images=images, latents=full.latents * torch.tensor([1.1, 0.5])[:, None, None, None])


def test_the_names_are_those_of_the_command_line_and_of_the_results():
    assert {str(metric): metric.score for metric in Metric} == {
        "psnr": "psnr_db",
        "ssim": "ssim",
        "latents": "latents_error",
        "truth": "truth_error",
        "coverage": "coverage",
        "clip": "clip_score",
        "lpips": "lpips",
    }
    assert [metric for metric in Metric if metric.needs_reference] == [
        Metric.PSNR,
        Metric.SSIM,
        Metric.LATENTS,
        Metric.LPIPS,
    ]


def test_an_image_is_scored_against_the_full_run_and_its_prompt(full, pruned):
    first, second = Metrics(WITHOUT_CLIP, PROMPTS).score(pruned, full, PROMPTS)
    assert list(first) == ["psnr_db", "ssim", "latents_error", "coverage"]
    assert first["psnr_db"] == psnr_db(pruned.images[0], full.images[0]) > second["psnr_db"]
    assert 1 > first["ssim"] > second["ssim"] > 0
    assert (first["latents_error"], second["latents_error"]) == pytest.approx((0.1, 0.5))
    for of_image, image, prompt in zip((first, second), pruned.images, PROMPTS, strict=True):
        assert of_image["coverage"] == coverage(np.asarray(image), prompt.scene)


def test_equal_samples_are_perfect(full):
    for scores in Metrics(WITHOUT_CLIP[:3], PROMPTS).score(full, full, PROMPTS):
        assert scores == {"psnr_db": None, "ssim": pytest.approx(1.0, abs=1e-9), "latents_error": 0.0}


def test_without_a_reference_only_the_prompt_counts(full):
    for scores in Metrics(WITHOUT_CLIP, PROMPTS).score(full, None, PROMPTS):
        assert list(scores) == ["coverage"]
        assert scores["coverage"] > 0.95


def test_the_distance_to_the_truth_is_the_full_runs_too(full, pruned):
    metrics = Metrics([Metric.LATENTS, Metric.TRUTH], PROMPTS)
    truth = full.latents * 1.25
    assert [scores["truth_error"] for scores in metrics.score(full, None, PROMPTS, truth)] == pytest.approx([0.2] * 2)
    for scores in metrics.score(pruned, full, PROMPTS, truth)[:1]:
        assert scores == pytest.approx({"latents_error": 0.1, "truth_error": 0.12})
    assert metrics.score(full, None, PROMPTS) == [{}, {}]


def test_ssim_is_that_of_wang_et_al(full, pruned):
    """Written out: means, variances and covariance under a Gaussian of sigma 1.5, 11x11 pixels, channels and
    pixels averaged, the image reflected at its borders."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-((offsets / 1.5) ** 2) / 2)
    kernel = (torch.outer(line, line) / line.sum() ** 2).expand(3, 1, 11, 11)
    for k, scores in enumerate(Metrics([Metric.SSIM], PROMPTS).score(pruned, full, PROMPTS)):
        arrays = [np.asarray(sample.images[k]) / 255 for sample in (pruned, full)]
        planes = [torch.from_numpy(array).permute(2, 0, 1)[None] for array in arrays]
        x, y = (torch.nn.functional.pad(plane, (5, 5, 5, 5), mode="reflect") for plane in planes)
        mean = [torch.nn.functional.conv2d(part, kernel, groups=3) for part in (x, y, x * x, y * y, x * y)]
        var_x, var_y, cov = mean[2] - mean[0] ** 2, mean[3] - mean[1] ** 2, mean[4] - mean[0] * mean[1]
        c1, c2 = 0.01**2, 0.03**2
        ratio = (2 * mean[0] * mean[1] + c1) * (2 * cov + c2)
        ratio = ratio / ((mean[0] ** 2 + mean[1] ** 2 + c1) * (var_x + var_y + c2))
        assert scores["ssim"] == pytest.approx(float(ratio.mean()), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_latents_of_half_precision(full, dtype):
    latents = torch.full((2, 64, 400), 300.0, dtype=dtype)  # whose squares' sum is beyond fp16
    packed, other = (dataclasses.replace(full, latents=latents * factor) for factor in (1, 2))
    for scores in Metrics([Metric.LATENTS], PROMPTS).score(other, packed, PROMPTS):
        assert scores["latents_error"] == pytest.approx(1.0, abs=1e-3)


def test_other_numbers_of_images_and_prompts_are_refused(full, pruned):
    fewer = Sample(images=full.images[:1], latents=full.latents[:1])
    for metric in (Metric.PSNR, Metric.SSIM, Metric.COVERAGE):
        with pytest.raises(ValueError, match="argument 2 is"):
            Metrics([metric], PROMPTS).score(pruned, fewer, PROMPTS[:1])


@pytest.mark.parametrize("metric", [Metric.PSNR, Metric.SSIM])
def test_a_reference_of_another_size_is_refused(full, metric):
    half = dataclasses.replace(full, images=[image.resize((64, 64)) for image in full.images])
    with pytest.raises(ShapeError, match="128x128"):
        Metrics([metric], PROMPTS).score(full, half, PROMPTS)


def test_the_coverage_needs_scenes():
    prompts = [*PROMPTS, Prompt(text="a lighthouse", scene=None), Prompt(text="a boat", scene=None)]
    with pytest.raises(SettingsError, match=r"metric coverage: the prompt 'a lighthouse' is not the caption"):
        Metrics([Metric.COVERAGE], prompts)
    Metrics([Metric.PSNR], prompts)


@pytest.mark.parametrize("metric", [Metric.SSIM, Metric.CLIP])
def test_without_torchmetrics_it_says_what_to_install(monkeypatch, metric):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(InstallationError, match=rf"metric {metric} needs torchmetrics") as caught:
        Metrics([metric], PROMPTS, "clip")
    assert caught.value.remedy == "pip install 'cat-pruning[eval]'"
    Metrics([Metric.PSNR], PROMPTS)


def test_the_clip_score_needs_a_model():
    with pytest.raises(SettingsError, match="metric clip: no model"):
        Metrics([Metric.CLIP], PROMPTS)


def test_the_clip_score_is_of_image_and_prompt(monkeypatch, full):
    made = []

    class Scorer:
        def __init__(self, model, device):
            made.append((model, device))

        def __call__(self, images, prompts):
            assert images == full.images
            return [float(len(prompt)) for prompt in prompts]

    monkeypatch.setattr(metrics_module, "ClipScorer", Scorer)
    metrics = Metrics([Metric.CLIP], PROMPTS, "owner/clip", torch.device("cpu"))
    for _ in range(2):
        assert metrics.score(full, None, PROMPTS) == [{"clip_score": float(len(text))} for text in CAPTIONS]
    assert made == [("owner/clip", torch.device("cpu"))]
