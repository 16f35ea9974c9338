"""The kinds of scenes that a miniature can be trained on: what draws them, and what scores them."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from types import ModuleType
from typing import Any

from cat_pruning.evaluation.coverage import coverage
from cat_pruning.evaluation.rich_coverage import rich_coverage
from cat_pruning.models import rich_scenes, scenes
from cat_pruning.models.prompts import unseen_rich_scenes, unseen_scenes


class SceneKind(StrEnum):
    """A kind of scenes."""

    FLAT = "flat"  # one or two flat shapes
    RICH = "rich"  # four to six textured ones

    @property
    def module(self) -> ModuleType:
        """Its module: `sample_scene`, `is_held_out`, `render`, `vocabulary`."""
        return {SceneKind.FLAT: scenes, SceneKind.RICH: rich_scenes}[self]

    @property
    def unseen(self) -> Callable[..., list[Any]]:
        """Draws so many scenes, with a generator, that no miniature was trained on."""
        return {SceneKind.FLAT: unseen_scenes, SceneKind.RICH: unseen_rich_scenes}[self]

    @property
    def coverage(self) -> Callable[..., float]:
        """Scores an image, uint8 (side, side, 3), against a scene."""
        return {SceneKind.FLAT: coverage, SceneKind.RICH: rich_coverage}[self]
