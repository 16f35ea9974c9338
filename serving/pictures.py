"""Images as the API gives them: files in base64, and token maps."""

from __future__ import annotations

import base64
import io
from typing import Final

import numpy as np
from PIL import Image
from torch import Tensor

# By the API's name of the format: Pillow's, and its options. PNG at level 1: a third of the time, few bytes more.
_FORMATS: Final = {"png": ("PNG", {"compress_level": 1}), "jpeg": ("JPEG", {}), "webp": ("WEBP", {})}
_QUALITY: Final = 95


def encoded(image: Image.Image, output_format: str, quality: int | None = None) -> str:
    """An image's file in base64.

    Args:
        image: of 8 bits per channel.
        output_format: png, jpeg or webp.
        quality: of a jpeg or webp, from 0 to 100.
    """
    name, options = _FORMATS[output_format]
    if output_format != "png":
        options = {"quality": _QUALITY if quality is None else quality}
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def token_map(counts: Tensor, grid: tuple[int, int], num_steps: int, size: tuple[int, int]) -> Image.Image:
    """How often each token was computed, as grey: white on every step, black never.

    Args:
        counts: (N,) int64.
        grid: tokens (high, wide).
        num_steps: of the image.
        size: of the picture in pixels (wide, high).
    """
    grey = np.rint(counts.reshape(grid).numpy() * (255.0 / max(1, num_steps))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).resize(size, Image.Resampling.NEAREST)
