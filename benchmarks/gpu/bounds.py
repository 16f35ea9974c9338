"""What a step and an image cost at 1024x1024 by the committed MACs, and the most that pruning can gain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cat_pruning.schedule import StepKind
from cat_pruning.settings import PruneSettings
from cat_pruning.timeline import step_kinds

if TYPE_CHECKING:
    from cat_pruning.exporter.macs import ImageMacs

RESULTS = Path(__file__).parents[1] / "results"


def committed_macs(model: str) -> dict[str, int]:
    """MACs of the parts of an image, as `make bench-macs` counted them, attention scores included."""
    content = json.loads((RESULTS / "macs.json").read_text(encoding="utf-8"))
    counted: dict[str, int] = content[model]["step"]["all"]
    return counted


def step_macs(model: str) -> dict[str, int]:
    """MACs of what the torch engine and diffusers compute in a step: nothing is split off."""
    macs = committed_macs(model)
    small = macs["prompt"] + macs["timestep"]
    return {kind: macs[kind] + small for kind in ("full", "pruned")}


def _image_macs(model: str) -> ImageMacs:
    from cat_pruning.exporter.macs import ImageMacs  # which imports the exporter's libraries

    return ImageMacs(**committed_macs(model))


def step_bound(model: str) -> float:
    """The most that a pruned step can gain."""
    macs = step_macs(model)
    return macs["full"] / macs["pruned"]


def loop_bound(model: str, num_steps: int, settings: PruneSettings) -> float:
    """The most that an image of so many steps can gain in the torch engine, at the default keep ratio."""
    macs = step_macs(model)
    cost = {StepKind.FULL: macs["full"], StepKind.PRUNED: macs["pruned"], StepKind.FORECAST: 0}
    return num_steps * macs["full"] / sum(cost[kind] for kind in step_kinds(num_steps, settings))


def fewer_steps(model: str, num_steps: int, settings: PruneSettings) -> int:
    """As many full steps as cost most nearly what `settings`, of the default keep ratio, do: see `evaluation.plan`."""
    image = _image_macs(model)
    budget = image.pruned_image(num_steps, settings)
    return max(1, round((budget - image.prompt) / (image.full + image.timestep)))
