"""Captioned scenes whose parts differ: four to six things of four textures on grounds of four.

The captions name all of it, place by place in reading order, and no two scenes share one. Shapes, colours and grounds
are those of `scenes`. The textures of things have a period in pixels, whatever the image's side, as those of a
photograph have; those of grounds grow with the image.
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cat_pruning.models.scenes import COLORS as ALL_COLORS
from cat_pruning.models.scenes import GROUNDS, HELD_OUT_SHARE, SHAPES, Rgb, draw_shape

# White is every texture's second colour.
COLORS = {name: rgb for name, rgb in ALL_COLORS.items() if name != "white"}
ACCENT: Rgb = ALL_COLORS["white"]
GROUND_ACCENTS: dict[str, Rgb] = {
    "black": (83, 83, 84),
    "gray": (165, 165, 168),
    "navy": (86, 93, 126),
    "beige": (186, 164, 126),
    "teal": (84, 160, 160),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = {"small": 0.08, "large": 0.125}  # radii, as fractions of the image's side
_NEAR, _MIDDLE, _FAR = 1 / 6, 1 / 2, 5 / 6
PLACES = {
    "northwest": (_NEAR, _NEAR),
    "north": (_MIDDLE, _NEAR),
    "northeast": (_FAR, _NEAR),
    "west": (_NEAR, _MIDDLE),
    "middle": (_MIDDLE, _MIDDLE),
    "east": (_FAR, _MIDDLE),
    "southwest": (_NEAR, _FAR),
    "south": (_MIDDLE, _FAR),
    "southeast": (_FAR, _FAR),
}
COUNTS = (4, 5, 6)
PLAIN_SHARE = 0.4  # of the things, and of the grounds
PERIOD = 16  # pixels, of a thing's texture
GROUND_PERIOD = 5 / 32  # of the side
DOT_RADIUS = 0.31  # of the period
JITTER, SIZE_JITTER = 0.015, 0.07  # of the places, as a fraction of the side; of the sizes


@dataclass(frozen=True, slots=True)
class RichThing:
    """One textured shape at its place."""

    size: str
    texture: str
    color: str
    shape: str
    place: str

    def __str__(self) -> str:
        return f"{self.size} {self.texture} {self.color} {self.shape} {self.place}"


@dataclass(frozen=True, slots=True)
class RichScene:
    """Several things, each at a place of its own, and what they are on.

    Attributes:
        things: in the order of `PLACES`.
        texture: the ground's, of `TEXTURES`.
        ground: a key of `GROUNDS`.
    """

    things: tuple[RichThing, ...]
    texture: str
    ground: str

    @property
    def caption(self) -> str:
        """The words that name the scene, all of it."""
        return f"{', '.join(map(str, self.things))} on a {self.texture} {self.ground} background"


def sample_scene(rng: np.random.Generator, counts: Sequence[int] = COUNTS) -> RichScene:
    """A random scene of one of these numbers of things."""
    count = int(rng.choice(counts))
    places = sorted(rng.choice(len(PLACES), count, replace=False))
    things = [_sample_thing(rng, list(PLACES)[place]) for place in places]
    return RichScene(tuple(things), _sample_texture(rng), str(rng.choice(list(GROUNDS))))


def is_held_out(scene: RichScene) -> bool:
    """Whether the scene's caption belongs to the twentieth that training leaves for the evaluation."""
    return zlib.crc32(scene.caption.encode()) % HELD_OUT_SHARE == 0


def parse_caption(text: str) -> RichScene | None:
    """The scene whose caption the text is, to the letter; None if it is no rich scene's."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        return None
    things = tuple(RichThing(*words.split(" ")) for words in match["things"].split(", "))
    scene = RichScene(things, match["texture"], match["ground"])
    order = [list(PLACES).index(thing.place) for thing in things]
    # Another order or a place named twice makes no scene.
    return scene if order == sorted(set(order)) else None


def render(
    scene: RichScene, side: int = 256, rng: np.random.Generator | None = None, supersample: int = 3, scale: float = 1.0
) -> NDArray[np.uint8]:
    """The scene as an image.

    Args:
        scene: what to draw.
        side: the image's side in pixels.
        rng: adds a small jitter of position and size; none without it.
        supersample: the image is drawn at this many times the side, then reduced.
        scale: of the things' sizes, before the jitter.

    Returns:
        uint8, (side, side, 3).
    """
    canvas = _ground_canvas(scene.texture, scene.ground, side, supersample).copy()
    for thing in scene.things:
        x, y = PLACES[thing.place]
        jitter = scale
        if rng is not None:
            x, y = x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER)
            jitter *= rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER)
        center = x * side * supersample, y * side * supersample
        _draw_thing(canvas, thing, center, SIZES[thing.size] * side * supersample * jitter, PERIOD * supersample)
    return np.asarray(canvas.reduce(supersample))


def vocabulary() -> list[str]:
    """Every word that a caption can contain, sorted."""
    words = {",", "on", "a", "background", *SIZES, *TEXTURES, *COLORS, *SHAPES, *PLACES, *GROUNDS}
    return sorted(words)


def texture_accents(
    texture: str, x: NDArray[np.floating[Any]], y: NDArray[np.floating[Any]], period: float
) -> NDArray[np.bool_]:
    """Where a texture shows its second colour.

    Args:
        texture: one of `TEXTURES`. Stripes run along y.
        x: pixel centers from the texture's origin, broadcastable with y.
        y: as x.
        period: in the same unit.
    """
    # The origin is in the middle of a stripe, of a check and of a dot.
    right, down = x / period + 0.25, y / period + 0.25
    odd_right, odd_down = right % 1 >= 0.5, down % 1 >= 0.5
    if texture == "striped":
        return odd_right | np.zeros_like(odd_down)  # of both axes
    if texture == "checked":
        return odd_right ^ odd_down
    if texture == "dotted":
        inside: NDArray[np.bool_] = np.hypot((x / period + 0.5) % 1 - 0.5, (y / period + 0.5) % 1 - 0.5) < DOT_RADIUS
        return inside
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)


def _sample_texture(rng: np.random.Generator) -> str:
    return TEXTURES[0] if rng.random() < PLAIN_SHARE else str(rng.choice(TEXTURES[1:]))


def _sample_thing(rng: np.random.Generator, place: str) -> RichThing:
    size, color = str(rng.choice(list(SIZES))), str(rng.choice(list(COLORS)))
    return RichThing(size, _sample_texture(rng), color, str(rng.choice(SHAPES)), place)


@functools.lru_cache(maxsize=64)
def _ground_canvas(texture: str, ground: str, side: int, supersample: int) -> Image.Image:
    along = (np.arange(side * supersample) + 0.5) / supersample
    # A ground's stripes lie, those of things stand.
    accents = texture_accents(texture, along[:, None], along[None, :], GROUND_PERIOD * side)
    colors = np.array([GROUNDS[ground], GROUND_ACCENTS[ground]], dtype=np.uint8)
    return Image.fromarray(colors[accents.astype(np.intp)])


def _draw_thing(
    canvas: Image.Image, thing: RichThing, center: tuple[float, float], radius: float, period: float
) -> None:
    left, top = (math.floor(each - 1.3 * radius) for each in center)
    extent = math.ceil(2.6 * radius) + 1
    x, y = center[0] - left, center[1] - top
    mask = Image.new("L", (extent, extent), 0)
    draw_shape(ImageDraw.Draw(mask), thing.shape, x, y, radius, 255)
    along = np.arange(extent) + 0.5
    accents = texture_accents(thing.texture, along[None, :] - x, along[:, None] - y, period)
    colors = np.array([COLORS[thing.color], ACCENT], dtype=np.uint8)
    canvas.paste(Image.fromarray(colors[accents.astype(np.intp)]), (left, top), mask)


def _any_of(*words: str) -> str:
    return f"(?:{'|'.join(words)})"


_THING = " ".join(_any_of(*words) for words in (SIZES, TEXTURES, COLORS, SHAPES, PLACES))
# Reads what `RichScene.caption` writes.
_CAPTION = re.compile(
    f"(?P<things>{_THING}(?:, {_THING}){{{COUNTS[0] - 1},{COUNTS[-1] - 1}}})"
    f" on a (?P<texture>{_any_of(*TEXTURES)}) (?P<ground>{_any_of(*GROUNDS)}) background"
)
