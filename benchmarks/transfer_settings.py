"""Where a tuned schedule was not fitted, for `transfer.py`, and the errors that are collected there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cat_pruning.evaluation.intervals import mean_interval

BATCH = 8
WORDS = (
    "a quiet harbour at dawn",
    "two foxes asleep under an old oak",
    "the inside of a clock",
    "portrait of a smiling astronaut, oil on canvas",
    "rain on a tin roof",
    "a bowl of oranges next to an open window",
    "city lights seen from a train",
    "a paper boat in a gutter",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What an image is made at; the defaults are what the schedules were fitted to."""

    guidance: float = 3.0
    size: int = 128
    prompts: str = "scenes"
    batch: int = BATCH
    shift: float = 1.0
    strength: float = 1.0  # below 1: image-to-image


SETTINGS: dict[str, Setting] = {
    "as fitted": Setting(),
    "guidance 1.5": Setting(guidance=1.5),
    "guidance 2": Setting(guidance=2.0),
    "guidance 5": Setting(guidance=5.0),
    "guidance 7": Setting(guidance=7.0),
    "64x64": Setting(size=64),
    "96x96": Setting(size=96),
    "160x160": Setting(size=160),
    "rich captions": Setting(prompts="rich"),
    "free words": Setting(prompts="words"),
    "one prompt at a time": Setting(batch=1),
    "image-to-image 0.8": Setting(strength=0.8),
    "image-to-image 0.6": Setting(strength=0.6),
    "image-to-image 0.4": Setting(strength=0.4),
    "shift 1.5": Setting(shift=1.5),
    "shift 3": Setting(shift=3.0),
}
Rows = dict[str, dict[str, Any]]


class Errors:
    """Relative errors of latents by method and budget, and the full steps that they took."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, int], list[float]] = {}
        self.computed: dict[tuple[str, int], int] = {}

    def add(self, method: str, budget: int, computed: int, latents: Tensor, full: Tensor) -> None:
        """Some more images."""
        errors = (latents - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)
        self.values.setdefault((method, budget), []).extend(errors.tolist())
        self.computed[method, budget] = computed


def rows_of(errors: Errors) -> Rows:
    """By contender its mean error with the interval, and its full steps."""
    rows: Rows = {}
    for (method, budget), values in errors.values.items():
        interval = mean_interval(values, range(len(values)))
        assert interval is not None
        rows[f"{method}, {budget}"] = {
            "latents_error": interval.mean,
            "half_width": interval.half_width,
            "prompts": interval.prompts,
            "full_steps": errors.computed[method, budget],
        }
    return rows
