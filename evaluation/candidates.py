"""What an evaluation compares: candidates, each one method on one schedule at one keep ratio."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cat_pruning.evaluation.solvers import SOLVERS

FULL = "full"  # the method that computes every token on every step; the others are compared with it
TUNED = "tuned"  # the method of a schedule of the bundle, by `cat-tune`; tuned-9, of that with 9 full steps
FEWER_STEPS = "fewer-steps"  # the method that computes every token, on as many steps as cost what CAT's image costs


def is_tuned(method: str) -> bool:
    """Whether a method takes a schedule of the bundle."""
    return method == TUNED or tuned_full_steps(method) is not None


def tuned_full_steps(method: str) -> int | None:
    """The full steps of the schedule that a method names: 9 of tuned-9, None of tuned and of other methods."""
    first, _, number = method.partition("-")
    return int(number) if first == TUNED and number.isdecimal() and number.isascii() else None


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
        quantization: of the bundle that computes it, as its manifest names it; empty for the evaluation's own bundle.
        quantized_sha256: `Manifest.digest` of that bundle.
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
    quantization: str = ""
    quantized_sha256: str = ""

    @property
    def is_reference(self) -> bool:
        """Whether the others of its schedule are compared with it: the full run that is not quantized."""
        return self.method == FULL and not self.quantization

    @property
    def key(self) -> str:
        """Its name in files: full-28, cat-28-0.3, int8-cat-28-0.3."""
        first = f"{self.quantization}-" if self.quantization else ""
        return f"{first}{self.method}-{self.steps}" + ("" if self.method == FULL else f"-{self.keep_ratio:g}")

    @property
    def name(self) -> str:
        """Its name in a table of its schedule and ratio."""
        return f"{self.quantization} {self._name}".lstrip()

    @property
    def _name(self) -> str:
        if self.method == FEWER_STEPS:
            return f"{self.sampled_steps} full steps"
        if self.method in SOLVERS:
            return f"{self.sampled_steps} full steps, {self.method}"
        if is_tuned(self.method):
            return f"{TUNED} ({self.full_steps} full)"
        if every := self.settings.get("refresh_every"):
            return f"{self.method} (keep {self.settings['keep_ratio']:.2g}, {self.full_steps} full, every {every})"
        return self.method

    @property
    def title(self) -> str:
        """Its name in sentences and above pictures."""
        if self.method == FULL:
            return f"{self.name}, {self.steps} steps"
        return self.name if self._name != self.method else f"{self.name}, keep {self.keep_ratio:g}"
