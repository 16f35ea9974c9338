"""What is compared: a method on a schedule of so many steps, at a share of the tokens."""

from __future__ import annotations

from dataclasses import dataclass

FULL = "full"  # every step of the schedule, every token: what the others are compared with
FEWER_STEPS = "fewer-steps"  # every token, on as many steps as cost what the default policy's image costs
BASELINES = (FULL, FEWER_STEPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to make the same images.

    Attributes:
        method: `FULL`, `FEWER_STEPS` or the name of a policy.
        steps: of the schedule that it stands for; fewer steps are run with `sampled_steps` instead.
        keep_ratio: share of the tokens that a pruned step computes; for fewer steps, of the policy that costs as much.
        sampled_steps: what the pipeline is asked for.
        full_steps: how many of them compute every token.
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
    engine: str = ""
    prompts: int = 0

    @property
    def key(self) -> str:
        """Its name in files: full-28, cat-28-0.3."""
        return f"{self.method}-{self.steps}" + ("" if self.method == FULL else f"-{self.keep_ratio:g}")

    @property
    def title(self) -> str:
        """Its name for people."""
        if self.method == FULL:
            return f"full, {self.steps} steps"
        if self.method == FEWER_STEPS:
            return f"{self.sampled_steps} full steps"
        return f"{self.method}, keep {self.keep_ratio:g}"
