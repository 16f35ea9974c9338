"""What is compared: a method on a schedule of so many steps, at a share of the tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FULL = "full"  # every step of the schedule, every token: what the others are compared with
FEWER_STEPS = "fewer-steps"  # every token, on as many steps as cost what the default policy's image costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to make the same images.

    Attributes:
        method: `FULL`, `FEWER_STEPS` or the name of a method.
        steps: of the schedule that it stands for; fewer steps are run with `sampled_steps` instead.
        keep_ratio: share of the tokens that a pruned step computes; for fewer steps, refreshed methods and the
            forecast, of the policy that costs as much.
        sampled_steps: what the pipeline is asked for.
        full_steps: how many of them compute every token.
        settings: of the pruning, as `PruneSettings.to_dict` has them.
        macs_linear, macs_all: of one image, in the conventions of `cat_pruning.exporter.macs`.
        engine: what computes it.
        prompts: how many of the evaluation's prompts it is run on, from the first.
    """

    method: str
    steps: int
    keep_ratio: float
    sampled_steps: int
    full_steps: int
    macs_linear: int
    macs_all: int
    settings: dict[str, Any] = field(default_factory=dict)
    engine: str = ""
    prompts: int = 0

    @property
    def key(self) -> str:
        """Its name in files: full-28, cat-28-0.3."""
        return f"{self.method}-{self.steps}" + ("" if self.method == FULL else f"-{self.keep_ratio:g}")

    @property
    def name(self) -> str:
        """Its name among those of its schedule and ratio."""
        if self.method == FEWER_STEPS:
            return f"{self.sampled_steps} full steps"
        if every := self.settings.get("refresh_every"):
            return f"{self.method} (keep {self.settings['keep_ratio']:.2g}, {self.full_steps} full, every {every})"
        return self.method

    @property
    def title(self) -> str:
        """Its name for people."""
        if self.method == FULL:
            return f"full, {self.steps} steps"
        return self.name if self.name != self.method else f"{self.method}, keep {self.keep_ratio:g}"
