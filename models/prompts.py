"""The prompts of an evaluation: those of a file, or captions of scenes that no miniature was trained on."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cat_pruning.errors import SettingsError
from cat_pruning.models import rich_scenes
from cat_pruning.models import scenes as plain_scenes
from cat_pruning.models.prompt_files import prompts_of_file
from cat_pruning.models.rich_scenes import RichScene
from cat_pruning.models.scenes import (
    COLORS,
    GROUNDS,
    PAIRS,
    SHAPES,
    SINGLE,
    SIZES,
    Scene,
    Thing,
    is_held_out,
    sample_scene,
)

SCENES, RICH = "scenes:", "rich:"  # begin a source that is no file; a number follows
SCENES_SEED = 2026
_TUNING_SEED = 1807
# 8,263 captions are unseen. To draw the last of them at random would take minutes.
MAX_SCENES = 5000
# sd3-mini's 24,000 captions were the first of seed 0, before captions were held out.
_FIRST_SEED, _FIRST_SCENES = 0, 24_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A text to make an image of.

    Attributes:
        text: the prompt.
        scene: what the image should show, where the text is the caption of a scene.
    """

    text: str
    scene: Scene | RichScene | None


def load_prompts(source: str, limit: int | None = None) -> list[Prompt]:
    """The prompts of a source, in its order.

    Args:
        source: `scenes:N` or `rich:N`, the first N of the captions that `training/evaluate_mini.py` scores sd3-mini and
            pixart-mini, or sd3-mini-256 on, or a file: see `prompts_of_file`.
        limit: at most so many, the first.

    Raises:
        SettingsError: no such file, one of another form, one without prompts, a number outside its range.
    """
    if limit is not None and limit < 1:
        raise SettingsError(f"limit={limit}: expected at least one prompt")
    for prefix, unseen in ((SCENES, unseen_scenes), (RICH, unseen_rich_scenes)):
        if source.startswith(prefix):
            count = _scene_count(source, prefix)
            scenes = unseen(count if limit is None else min(count, limit), np.random.default_rng(SCENES_SEED))
            return [Prompt(text=scene.caption, scene=scene) for scene in scenes]
    texts = prompts_of_file(Path(source), otherwise=f"{SCENES}N or {RICH}N")
    return [Prompt(text=text, scene=parse_caption(text) or rich_scenes.parse_caption(text)) for text in texts[:limit]]


def tuning_prompts(source: str) -> list[Prompt]:
    """The prompts to tune a model on: as `load_prompts`, but of scenes none that an evaluation draws.

    Raises:
        SettingsError: as `load_prompts`.
    """
    for prefix, module in ((SCENES, plain_scenes), (RICH, rich_scenes)):
        if source.startswith(prefix):
            rng, captions = np.random.default_rng(_TUNING_SEED), dict[str, Any]()
            while len(captions) < _scene_count(source, prefix):
                scene = module.sample_scene(rng)
                if not module.is_held_out(scene):
                    captions[scene.caption] = scene
            return [Prompt(text=caption, scene=scene) for caption, scene in captions.items()]
    return load_prompts(source)


def located(source: str) -> str:
    """A source of prompts as a bundle records it: a file by its whole path, as the model's and an adapter's are."""
    return source if source.startswith((SCENES, RICH)) else os.path.realpath(source)


def unseen_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """Distinct random scenes whose captions no miniature was trained on: held out, and not in sd3-mini's data set.

    Raises:
        SettingsError: more than `MAX_SCENES`.
    """
    _check_count(count)
    seen = set(_first_captions())
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if is_held_out(scene) and scene.caption not in seen:
            scenes.append(scene)
            seen.add(scene.caption)
    return scenes


def unseen_rich_scenes(count: int, rng: np.random.Generator) -> list[RichScene]:
    """Distinct random rich scenes whose captions sd3-mini-256 was not trained on.

    Raises:
        SettingsError: more than `MAX_SCENES`.
    """
    _check_count(count)
    scenes: dict[str, RichScene] = {}
    while len(scenes) < count:
        scene = rich_scenes.sample_scene(rng)
        if rich_scenes.is_held_out(scene):
            scenes[scene.caption] = scene
    return list(scenes.values())


def parse_caption(text: str) -> Scene | None:
    """The scene whose caption the text is, to the letter; None if it is no scene's."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        return None
    *first, alone, between = match.group("size", "color", "shape", "alone", "between")
    things = [Thing(*first)]
    if between is not None:
        things.append(Thing(*match.group("size2", "color2", "shape2")))
    return Scene(tuple(things), between or alone, match["ground"], match["texture"] == "striped")


@functools.cache
def _first_captions() -> frozenset[str]:
    rng = np.random.default_rng(_FIRST_SEED)
    return frozenset(sample_scene(rng).caption for _ in range(_FIRST_SCENES))


def _check_count(count: int) -> None:
    if count > MAX_SCENES:
        raise SettingsError(f"{count} unseen scenes: there are at most {MAX_SCENES}", "ask for fewer")


def _scene_count(source: str, prefix: str) -> int:
    number = source.removeprefix(prefix)
    if not (re.fullmatch(r"[0-9]{1,9}", number) and 1 <= int(number) <= MAX_SCENES):
        raise SettingsError(f"{source}: expected {prefix}N with a whole number N from 1 to {MAX_SCENES}")
    return int(number)


def _any_of(group: str, words: tuple[str, ...]) -> str:
    return f"(?P<{group}>{'|'.join(words)})"


def _thing_pattern(number: str) -> str:
    parts = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES}
    return "a " + " ".join(_any_of(name + number, words) for name, words in parts.items())


# Reads what `Scene.caption` writes.
_CAPTION = re.compile(
    f"{_thing_pattern('')} "
    f"(?:{_any_of('alone', tuple(SINGLE))}|{_any_of('between', tuple(PAIRS))} {_thing_pattern('2')})"
    f" on a {_any_of('texture', ('plain', 'striped'))} {_any_of('ground', tuple(GROUNDS))} background"
)
