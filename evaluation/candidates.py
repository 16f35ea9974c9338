"""What an evaluation compares: candidates, each one method on one schedule at one keep ratio."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cat_pruning.evaluation.solvers import SOLVERS

FULL = "full"  # the method that computes every token on every step; the others are compared with it
TUNED = "tuned"  # the method of a schedule of the bundle, by `cat-tune`
FEWER_STEPS = "fewer-steps"  # the method that computes every token, on as many steps as cost what CAT's image costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to make the same images.

    Attributes:
        method: `FULL`, `FEWER_STEPS`, a solver or another name of `cat_pruning.evaluation.methods`.
        steps: of the schedule that it belongs to.
        keep_ratio: share of the tokens that a pruned step computes. Fewer steps, solvers, refreshed methods and the
            forecast have the keep ratio of the policy that costs as much.
        sampled_steps: the number of steps that the pipeline is asked for; `steps`, but for fewer steps and solvers.
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
        """Its name in a table of its schedule and ratio."""
        if self.method == FEWER_STEPS:
            return f"{self.sampled_steps} full steps"
        if self.method in SOLVERS:
            return f"{self.sampled_steps} full steps, {self.method}"
        if self.method == TUNED:
            return f"{self.method} ({self.full_steps} full)"
        if every := self.settings.get("refresh_every"):
            return f"{self.method} (keep {self.settings['keep_ratio']:.2g}, {self.full_steps} full, every {every})"
        return self.method

    @property
    def title(self) -> str:
        """Its name in sentences and above pictures."""
        if self.method == FULL:
            return f"full, {self.steps} steps"
        return self.name if self.name != self.method else f"{self.method}, keep {self.keep_ratio:g}"
