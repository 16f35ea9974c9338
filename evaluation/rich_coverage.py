"""Coverage of rich scenes: how well an image shows its caption's scene, a number in [0, 1], without a learned judge.

As `coverage` does it, for things and grounds of two colours: every pixel of a thing's part of the picture is explained
as a mixture of two of the scene's colours there, and belongs to the thing if at least half of it is the thing's. The
best IoU of these pixels with the thing's rendered mask, over small shifts and the sizes that occur, counts in full if
the texture inside is the caption's, else by half. The coverage of an image is the mean over its things.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
from numpy.typing import NDArray

from cat_pruning.errors import ShapeError
from cat_pruning.models.rich_scenes import (
    ACCENT,
    COLORS,
    GROUND_ACCENTS,
    PERIOD,
    PLACES,
    TEXTURES,
    RichScene,
    RichThing,
    render,
    texture_accents,
)
from cat_pruning.models.scenes import GROUNDS

OFF_MIXTURE = 50.0  # how far in RGB a pixel may be from every mixture of two of the scene's colours
REACH = 5  # pixels that a mask is shifted by at most; positions jitter by 3.8 of 256
SCALES = (0.95, 1.0, 1.05)  # sizes jitter by 7 %
PHASES = 8  # in a period: where a painted texture may begin, along either axis
WRONG_TEXTURE = 0.5


def rich_coverage(image: NDArray[np.uint8], scene: RichScene) -> float:
    """Mean over the scene's things of the best IoU of mask and covered pixels, halved where the texture is another.

    Args:
        image: uint8, (side, side, 3).
        scene: what it should show.

    Returns:
        A number in [0, 1].

    Raises:
        ShapeError: the image is not square.
    """
    height, width = image.shape[:2]
    if height != width:
        raise ShapeError(f"an image of {width}x{height} pixels: scenes are square")
    return float(np.mean([_thing_coverage(image, scene, thing) for thing in scene.things]))


def _thing_coverage(image: NDArray[np.uint8], scene: RichScene, thing: RichThing) -> float:
    side = len(image)
    window = image[_window_slices(side, PLACES[thing.place])].astype(float)
    own = _palette(COLORS[thing.color], ACCENT, thing.texture)
    covered = _covered(window, own, _palette(GROUNDS[scene.ground], GROUND_ACCENTS[scene.ground], scene.texture))
    iou, mask = max((_best_iou(covered, *_shifted(thing.size, thing.shape, side, s)) for s in SCALES), key=_first)
    painted = painted_texture(window[mask], np.argwhere(mask), thing.color)
    return iou if painted == thing.texture else iou * WRONG_TEXTURE


def painted_texture(pixels: NDArray[np.float64], at: NDArray[np.int64], color: str) -> str:
    """The texture, of a thing of this colour, whose rendering is nearest to the pixels, whatever its phase.

    Args:
        pixels: RGB, (n, 3).
        at: their rows and columns, (n, 2).
        color: a key of `COLORS`.
    """
    phases = np.arange(PHASES) / PHASES * PERIOD
    down, right = (at[:, axis] + phases[:, None] for axis in (0, 1))  # (PHASES, n)
    as_color, as_accent = (((pixels - np.array(rgb)) ** 2).sum(-1) for rgb in (COLORS[color], ACCENT))

    def error(texture: str) -> float:
        accents = texture_accents(texture, right[:, None], down[None], PERIOD)  # (PHASES, PHASES, n)
        return float(np.where(accents, as_accent, as_color).mean(-1).min())

    return min(TEXTURES, key=error)


def _palette(color: tuple[int, int, int], accent: tuple[int, int, int], texture: str) -> NDArray[np.float64]:
    return np.array([color] if texture == "plain" else [color, accent], dtype=float)


def _covered(window: NDArray[np.float64], own: NDArray[np.float64], ground: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where the mixture of two colours that is nearest to the pixel has at least half of the thing's own.

    Args:
        window: RGB, (h, w, 3).
        own: the thing's colours, (1 or 2, 3).
        ground: the ground's, (1 or 2, 3).
    """
    colors = [(each, 1.0) for each in own] + [(each, 0.0) for each in ground]
    distances, shares = [], []
    for (a, share_a), (b, share_b) in itertools.combinations(colors, 2):
        toward = np.clip(((window - a) * (b - a)).sum(-1) / ((b - a) ** 2).sum(), 0.0, 1.0)
        distances.append(np.linalg.norm(window - a - toward[..., None] * (b - a), axis=-1))
        shares.append(share_a + toward * (share_b - share_a))
    nearest = np.argmin(distances, axis=0)[None]
    distance, share = (np.take_along_axis(np.array(each), nearest, axis=0)[0] for each in (distances, shares))
    covered: NDArray[np.bool_] = (share >= 0.5) & (distance < OFF_MIXTURE)
    return covered


def _best_iou(
    covered: NDArray[np.bool_], masks: NDArray[np.float32], sizes: NDArray[np.int64]
) -> tuple[float, NDArray[np.bool_]]:
    """The greatest IoU of the covered pixels with one of the masks, and that mask.

    Args:
        covered: bool, (h, w).
        masks: 0 or 1, (shifts, shifts, h, w).
        sizes: how many ones each mask has, (shifts, shifts).
    """
    # Counts of pixels are exact in fp32 below 2**24.
    both = np.einsum("yxij,ij->yx", masks, covered.astype(np.float32)).astype(np.int64)
    iou = both / np.maximum(sizes + covered.sum() - both, 1)
    best = np.unravel_index(np.argmax(iou), iou.shape)
    return float(iou[best]), masks[best] > 0


def _first(pair: tuple[float, NDArray[np.bool_]]) -> float:
    return pair[0]


@functools.cache
def _shifted(size: str, shape: str, side: int, scale: float) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A thing's mask in a window around its place, shifted by up to `REACH` both ways, and how many pixels each has."""
    alone = RichScene((RichThing(size, "plain", "pink", shape, "middle"),), "plain", "black")
    mask = (render(alone, side, scale=scale)[..., 0] > 128).astype(np.float32)
    rows, columns = _window_slices(side, PLACES["middle"])
    # A view of the mask: instead of the mask, the window moves.
    around = mask[rows.start - REACH : rows.stop + REACH, columns.start - REACH : columns.stop + REACH]
    window = (rows.stop - rows.start, columns.stop - columns.start)
    masks = np.lib.stride_tricks.sliding_window_view(around.copy(), window)
    return masks, masks.sum((2, 3)).astype(np.int64)


def _window_slices(side: int, center: tuple[float, float]) -> tuple[slice, slice]:
    """Rows and columns of a place's ninth of the picture."""
    radius = side // 6
    x, y = (int(coordinate * side) for coordinate in center)
    return slice(y - radius, y + radius), slice(x - radius, x + radius)
