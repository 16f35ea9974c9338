"""The kinds of scenes that a miniature can be trained on, and the modules that draw them."""

from __future__ import annotations

from enum import StrEnum
from types import ModuleType

from cat_pruning.evaluation import rich_scenes, scenes


class SceneKind(StrEnum):
    """A kind of scenes."""

    FLAT = "flat"  # one or two flat shapes
    RICH = "rich"  # four to six textured ones

    @property
    def module(self) -> ModuleType:
        """Its module: `sample_scene`, `is_held_out`, `render`, `vocabulary`."""
        return {SceneKind.FLAT: scenes, SceneKind.RICH: rich_scenes}[self]
