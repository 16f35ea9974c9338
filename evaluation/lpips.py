"""LPIPS, the perceptual distance of two images (Zhang et al., CVPR 2018), with AlexNet.

torchmetrics has the linear heads in its wheel; AlexNet's weights are a download of torchvision's, which this reads from
a local file, so that neither torchvision nor a network is needed.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cat_pruning.checkpoints.library_logs import first_line
from cat_pruning.errors import SettingsError, ShapeError
from cat_pruning.files import open_file

WEIGHTS = "alexnet-owt-7be5be79.pth, which torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url names"
_CHANNELS = (64, 192, 384, 256, 256)
_READ = (1, 4, 7, 9, 11)  # the layers whose outputs are compared: the rectifications
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's colours, of pixels in [-1, 1]


class LpipsScorer:
    """The distance of images, with weights that are loaded once, in fp32 on the CPU.

    With the features f_l of AlexNet's five rectifications, each position's scaled to length 1, and the heads w_l:

        d(x, y) = Σ_l mean over positions of Σ_c w_lc · (f_l(x) - f_l(y))²

    Args:
        weights: the file of torchvision's AlexNet, `WEIGHTS`.

    Raises:
        SettingsError: it is not there, or is another model's.
    """

    def __init__(self, weights: str | Path) -> None:
        self._features = _alexnet_features(Path(weights))
        self._heads = _heads()

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], others: Sequence[Image.Image]) -> list[float]:
        """The distance of every image to the other in the same place: 0 for equal ones.

        Raises:
            ShapeError: images of different sizes.
        """
        return [self._distance(image, other) for image, other in zip(images, others, strict=True)]

    def _distance(self, image: Image.Image, other: Image.Image) -> float:
        if image.size != other.size:
            raise ShapeError(
                f"images of {image.width}x{image.height} and {other.width}x{other.height} pixels: expected one size"
            )
        x = torch.stack([_pixels(image), _pixels(other)])  # (2, 3, H, W)
        distance = 0.0
        for index, layer in enumerate(self._features):
            x = layer(x)
            if index in _READ:
                unit = x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
                apart = (unit[0] - unit[1]).square().mean((1, 2))  # (C,)
                distance += float(self._heads[_READ.index(index)] @ apart)
        return distance


def _pixels(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    return (pixels - torch.tensor(_SHIFT)[:, None, None]) / torch.tensor(_SCALE)[:, None, None]


def _alexnet_features(file: Path) -> nn.Sequential:
    """AlexNet's convolutions (Krizhevsky 2014, "One weird trick"), by torchvision's names and numbers."""
    first, second, third, fourth, fifth = _CHANNELS
    features = nn.Sequential(
        nn.Conv2d(3, first, kernel_size=11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(first, second, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(second, third, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(third, fourth, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(fourth, fifth, kernel_size=3, padding=1),
        nn.ReLU(),
    )
    remedy = f"give the file {WEIGHTS}"
    try:
        with open_file(file) as opened:
            loaded = torch.load(opened, map_location="cpu", weights_only=True)
        prefix = "features."
        weights = {name.removeprefix(prefix): each for name, each in loaded.items() if name.startswith(prefix)}
        features.load_state_dict(weights)
    except OSError as error:
        raise SettingsError(f"metric lpips: {file} cannot be read ({error.strerror or error})", remedy) from error
    except pickle.UnpicklingError as error:  # torch's own words end in the advice to run whatever the pickle says
        problem = f"metric lpips: {file} is not torchvision's AlexNet: it holds more than weights, or is no pickle"
        raise SettingsError(problem, remedy) from error
    except (RuntimeError, EOFError, AttributeError, ValueError, TypeError, LookupError) as error:
        reason = first_line(error)
        raise SettingsError(f"metric lpips: {file} is not torchvision's AlexNet ({reason})", remedy) from error
    return features.eval()


def _heads() -> list[Tensor]:
    """The weights of each layer's channels, (C,), of LPIPS 0.1, from torchmetrics' wheel."""
    spec = find_spec("torchmetrics")
    assert spec is not None  # checked where metrics are chosen
    assert spec.origin is not None
    file = Path(spec.origin).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    return [loaded[f"lin{layer}.model.1.weight"].flatten() for layer in range(len(_CHANNELS))]
