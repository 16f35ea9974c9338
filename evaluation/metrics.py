"""The metrics that score an image: how near it is to the full run's image, and how well it shows its prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cat_pruning.errors import InstallationError, SettingsError, ShapeError
from cat_pruning.evaluation.clip_score import ClipScorer
from cat_pruning.evaluation.coverage import coverage
from cat_pruning.evaluation.lpips import WEIGHTS, LpipsScorer
from cat_pruning.evaluation.rich_coverage import rich_coverage
from cat_pruning.installation import pip_install
from cat_pruning.models.prompts import Prompt
from cat_pruning.models.rich_scenes import RichScene
from cat_pruning.tools.pictures import psnr_db


class Metric(StrEnum):
    """The metrics by their names on the command line."""

    PSNR = "psnr"
    SSIM = "ssim"
    LATENTS = "latents"
    TRUTH = "truth"
    COVERAGE = "coverage"
    CLIP = "clip"
    LPIPS = "lpips"

    @property
    def score(self) -> str:
        """Its name in `ImageResult.scores`."""
        return _SCORES[self]

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the full run."""
        return self in _OF_REFERENCE or self is Metric.LPIPS


_SCORES = {
    Metric.PSNR: "psnr_db",
    Metric.SSIM: "ssim",
    Metric.LATENTS: "latents_error",
    Metric.TRUTH: "truth_error",
    Metric.COVERAGE: "coverage",
    Metric.CLIP: "clip_score",
    Metric.LPIPS: "lpips",
}
DEFAULT_METRICS = (Metric.PSNR, Metric.SSIM, Metric.LATENTS, Metric.COVERAGE)  # what needs no more runs or weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The images that a pipeline made of a batch of prompts.

    Attributes:
        images: B of them.
        latents: after the last step, (B, ...), packed or not.
    """

    images: list[Image.Image]
    latents: Tensor


class Metrics:
    """Computes metrics. What they need is checked and loaded when it is made.

    Args:
        metrics: which.
        prompts: all that will be scored.
        clip_model: see `ClipScorer`; only the CLIP score needs it.
        device: where CLIP runs.
        lpips_weights: see `LpipsScorer`; only LPIPS needs them.

    Raises:
        InstallationError: a metric needs a package that is not installed.
        SettingsError: a metric cannot be computed: CLIP's or LPIPS' weights are not there, a prompt is
            no scene's caption.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        prompts: Sequence[Prompt],
        clip_model: str | Path | None = None,
        device: torch.device | str = "cpu",
        lpips_weights: str | Path | None = None,
    ) -> None:
        self.metrics = tuple(metrics)
        if Metric.COVERAGE in self.metrics:
            _check_scenes(prompts)
        for metric in self.metrics:
            if metric in (Metric.SSIM, Metric.CLIP, Metric.LPIPS):
                _check_torchmetrics(metric)
        self._clip = _clip_scorer(clip_model, device) if Metric.CLIP in self.metrics else None
        self._lpips = _lpips_scorer(lpips_weights) if Metric.LPIPS in self.metrics else None

    def score(
        self, sample: Sample, reference: Sample | None, prompts: Sequence[Prompt], truth: Tensor | None = None
    ) -> list[dict[str, float | None]]:
        """The scores of every image, by `Metric.score`; of equal images, psnr_db is None.

        Args:
            sample: the images.
            reference: those of the full run from the same noise; None leaves out the metrics against it.
            prompts: one of each image.
            truth: the latents of the converged run from the same noise; None leaves out the metric against it.

        Raises:
            ValueError: other numbers of images or prompts.
            ShapeError: the reference's images are of another size, or a scene's image is not square.
        """
        scores: list[dict[str, float | None]] = [{} for _ in sample.images]
        for metric in self.metrics:
            if (metric.needs_reference and reference is None) or (metric is Metric.TRUTH and truth is None):
                continue
            values = self._values(metric, sample, reference, prompts, truth)
            for of_image, value in zip(scores, values, strict=True):
                of_image[metric.score] = value
        return scores

    def _values(
        self,
        metric: Metric,
        sample: Sample,
        reference: Sample | None,
        prompts: Sequence[Prompt],
        truth: Tensor | None,
    ) -> Sequence[float | None]:
        if reference is not None and metric in _OF_REFERENCE:
            return _OF_REFERENCE[metric](sample, reference)
        if metric is Metric.LPIPS:
            assert self._lpips is not None
            assert reference is not None
            return self._lpips(sample.images, reference.images)
        if metric is Metric.TRUTH:
            assert truth is not None
            return relative_errors(sample.latents, truth)
        if metric is Metric.COVERAGE:
            return _coverages(sample.images, prompts)
        assert self._clip is not None
        return self._clip(sample.images, [prompt.text for prompt in prompts])


def _psnrs(sample: Sample, reference: Sample) -> list[float | None]:
    values = [psnr_db(image, full) for image, full in zip(sample.images, reference.images, strict=True)]
    return [None if math.isinf(value) else value for value in values]


def _ssims(sample: Sample, reference: Sample) -> list[float | None]:
    """Structural similarity, as torchmetrics computes it: a Gaussian window of 11 pixels, reflected at the borders."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values: list[float | None] = []
    for image, full in zip(sample.images, reference.images, strict=True):
        if image.size != full.size:
            raise ShapeError(
                f"images of {image.width}x{image.height} and {full.width}x{full.height} pixels: expected the same size"
            )
        values.append(float(structural_similarity_index_measure(_pixels(image), _pixels(full), data_range=1.0)))
    return values


def _latents_errors(sample: Sample, reference: Sample) -> list[float | None]:
    return relative_errors(sample.latents, reference.latents)


def relative_errors(latents: Tensor, reference: Tensor) -> list[float | None]:
    """‖x - x_reference‖ / ‖x_reference‖ over all of an image's latents, in fp32, for every image; synchronises."""
    expected = reference.float().flatten(1)  # (B, C*H*W)
    difference = latents.to(expected.device).float().flatten(1) - expected
    errors: list[float | None] = (difference.norm(dim=1) / expected.norm(dim=1)).tolist()
    return errors


_OF_REFERENCE: dict[Metric, Callable[[Sample, Sample], list[float | None]]] = {
    Metric.PSNR: _psnrs,
    Metric.SSIM: _ssims,
    Metric.LATENTS: _latents_errors,
}


def _coverages(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        assert prompt.scene is not None
        pixels, scene = np.asarray(image.convert("RGB")), prompt.scene
        scores.append(rich_coverage(pixels, scene) if isinstance(scene, RichScene) else coverage(pixels, scene))
    return scores


def _pixels(image: Image.Image) -> Tensor:
    # fp64: the variance of an even area is the difference of two near numbers, and equal images must have an SSIM of 1.
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float64) / 255.0).permute(2, 0, 1)[None]


def _check_scenes(prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if prompt.scene is None:
            raise SettingsError(
                f"metric {Metric.COVERAGE}: the prompt {prompt.text!r} is not the caption of a scene",
                "leave the metric out, or take the prompts of scenes:N or rich:N",
            )


def _check_torchmetrics(metric: Metric) -> None:
    if find_spec("torchmetrics") is None:
        raise InstallationError(f"metric {metric} needs torchmetrics, not installed here", pip_install("eval"))


def _clip_scorer(model: str | Path | None, device: torch.device | str) -> ClipScorer:
    if model is None:
        raise SettingsError(
            f"metric {Metric.CLIP}: no model", "give a directory with a CLIPModel, or its id on the hub"
        )
    return ClipScorer(model, device)


def _lpips_scorer(weights: str | Path | None) -> LpipsScorer:
    if weights is None:
        remedy = f"give AlexNet's by --lpips-weights: the file {WEIGHTS}"
        raise SettingsError(f"metric {Metric.LPIPS}: no weights", remedy)
    return LpipsScorer(weights)
