"""LPIPS against torchmetrics' own, with an AlexNet of random weights in a file as torchvision writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.functional.image import lpips as reference

from cat_pruning.errors import SettingsError, ShapeError
from cat_pruning.evaluation.lpips import LpipsScorer
from cat_pruning.evaluation.metrics import Metric, Metrics, Sample
from cat_pruning.models.prompts import Prompt


def noise(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    rows = np.random.default_rng(seed).integers(0, 256, (*size, 3))
    return Image.fromarray(rows.astype(np.uint8))


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    """torchvision's alexnet().features: the layers whose numbers the file has."""
    torch.manual_seed(0)
    pooled = {2: nn.MaxPool2d(3, 2), 5: nn.MaxPool2d(3, 2), 12: nn.MaxPool2d(3, 2)}
    convolutions = {
        0: nn.Conv2d(3, 64, 11, 4, 2),
        3: nn.Conv2d(64, 192, 5, padding=2),
        6: nn.Conv2d(192, 384, 3, padding=1),
        8: nn.Conv2d(384, 256, 3, padding=1),
        10: nn.Conv2d(256, 256, 3, padding=1),
    }
    return nn.Sequential(*(convolutions.get(layer, pooled.get(layer, nn.ReLU())) for layer in range(13)))


@pytest.fixture(scope="module")
def weights(features: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(2, 2)}, file)
    return file


def test_it_is_torchmetrics(features: nn.Sequential, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose heads it has; its backbone is given the same weights."""
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *_: features)
    expected = reference._LPIPS(pretrained=True, net="alex", pnet_rand=True)
    images, others = [noise(0), noise(1)], [noise(2), noise(3)]
    found = LpipsScorer(weights)(images, others)
    for value, image, other in zip(found, images, others, strict=True):
        pixels = [torch.from_numpy(np.array(each)).permute(2, 0, 1)[None] / 255 for each in (image, other)]
        assert value == pytest.approx(float(expected(*pixels, normalize=True)), rel=1e-4)
    assert found[0] != found[1]
    assert LpipsScorer(weights)(images, images) == [0.0, 0.0]


def test_as_a_metric_against_the_full_run(weights: Path) -> None:
    prompts = [Prompt(text="a boat", scene=None)]
    full, other = (Sample(images=[noise(seed)], latents=torch.zeros(1, 1)) for seed in (0, 1))
    metrics = Metrics([Metric.LPIPS], prompts, lpips_weights=weights)
    assert metrics.score(full, None, prompts) == [{}]
    (scores,) = metrics.score(other, full, prompts)
    assert scores["lpips"] == LpipsScorer(weights)(other.images, full.images)[0] > 0


def test_images_of_different_sizes_are_refused(weights: Path) -> None:
    with pytest.raises(ShapeError, match="80x96 and 64x64"):
        LpipsScorer(weights)([noise(0)], [noise(0, (64, 64))])


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"no weights",
        {"features.0.weight": torch.zeros(1)},
        [1],
        {1: 2},
        {"features.0.weight": 3},
        nn.Linear(1, 1),
    ],
)
def test_a_file_that_is_no_alexnet(tmp_path: Path, content: object) -> None:
    file = tmp_path / "alexnet.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(SettingsError, match=r"metric lpips: .*alexnet\.pth") as caught:
        LpipsScorer(file)
    assert "alexnet-owt-7be5be79.pth" in caught.value.remedy
    assert "arbitrary code" not in str(caught.value)  # which torch would have one run


def test_without_a_file_it_says_what_to_download() -> None:
    with pytest.raises(SettingsError, match="metric lpips: no weights") as caught:
        Metrics([Metric.LPIPS], [])
    assert "alexnet-owt-7be5be79.pth" in caught.value.remedy
