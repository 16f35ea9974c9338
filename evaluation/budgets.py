"""Settings that cost as much as so many full steps: what schedules are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cat_pruning.exporter.macs import ImageMacs
from cat_pruning.settings import PRESETS, Preset, PruneSettings

_KEEP_RATIOS: Final = (0.3, 0.2, 0.1, 0.05)  # the paper's, and smaller ones for budgets that it does not reach
_LEAST_FULL: Final = 4  # full steps at the start of CAT that are worth having before fewer tokens are


def macs_of_full_steps(macs: ImageMacs, count: int) -> int:
    """MACs of an image of `count` steps, all full."""
    return macs.prompt + count * (macs.full + macs.timestep)


def cat_at(budget: int, steps: int, settings: PruneSettings, macs: Callable[[float], ImageMacs]) -> PruneSettings:
    """The paper's policy at the MACs of `budget` full steps: the most tokens that leave four full steps at the start.

    Args:
        budget: full steps.
        steps: of the schedule.
        settings: the rest.
        macs: of an image's parts, by the keep ratio.
    """
    plain = settings.replace(**PruneSettings().to_dict() | {"num_clusters": settings.num_clusters})
    wanted = macs_of_full_steps(macs(1.0), budget)
    nearest = plain
    for keep_ratio in _KEEP_RATIOS:
        possible = [plain.replace(keep_ratio=keep_ratio, full_steps=first) for first in range(2, steps + 1)]
        nearest = min(possible, key=lambda each: abs(macs(each.keep_ratio).pruned_image(steps, each) - wanted))
        if nearest.full_steps >= _LEAST_FULL:
            return nearest
    return nearest


def forecast_at(budget: int, steps: int, macs: ImageMacs) -> PruneSettings:
    """The preset `forecast` at the MACs of `budget` full steps, with its four at the start where there are six."""
    first = PRESETS[Preset.FORECAST]["full_steps"]
    settings = PruneSettings.preset(Preset.FORECAST, full_steps=first if budget >= first + 2 else 2)
    return nearest(macs_of_full_steps(macs, budget), settings, steps, macs, max(2, budget))


def nearest(budget: int, settings: PruneSettings, steps: int, macs: ImageMacs, most_full_steps: int) -> PruneSettings:
    """`settings` with the full steps at the start and the interval after them that cost most nearly `budget`.

    The interval alone would be too coarse where the steps between compute nothing, so the number at the start may
    rise to `most_full_steps`. Of equal costs, the fewest full steps at the start win.

    Args:
        budget: MACs.
        settings: the rest; its full steps are the fewest.
        steps: of the schedule.
        macs: of an image's parts.
        most_full_steps: at the start.
    """
    possible = [
        settings.replace(full_steps=first, refresh_every=every)
        for first in range(settings.full_steps, most_full_steps + 1)
        for every in range(2, max(3, steps))
    ]
    return min(possible, key=lambda each: abs(macs.pruned_image(steps, each) - budget))
