"""The settings of CAT pruning: one frozen dataclass, validated once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from cat_pruning.errors import SettingsError, ShapeError


class Policy(StrEnum):
    """How the tokens of a pruned step are chosen, as many by each. See `cat_pruning.runtime.selection.policies`."""

    CAT = "cat"  # clusters by relative noise, then stale tokens: the paper's algorithm 2
    NOISE = "noise"  # highest relative noise
    CLUSTER = "cluster"  # algorithm 2 without its stale tokens
    STALE = "stale"  # in turn
    RANDOM = "random"
    RAS = "ras"  # region-adaptive sampling


class Reuse(StrEnum):
    """What a token that is not computed contributes to the noise prediction."""

    REPEAT = "repeat"  # its last output: the paper's
    EXTRAPOLATE = "extrapolate"  # the line through its last two outputs. See `cat_pruning.runtime.extrapolation`


class Pooling(StrEnum):
    """How the relative noise of a cluster's tokens becomes one vector per cluster."""

    MAX = "max"  # signed maximum, channel by channel
    MEAN = "mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSettings:
    """What to compute on which step (Cheng, Chen, Jia 2025, algorithm 2). The defaults are the paper's.

    The ones that matter:
        keep_ratio: fraction of the image tokens that a pruned step computes, in [0, 1]; 1 is the unpruned model. 0
            computes nothing at all, the text's rows neither: `forecast`.
        full_steps: full steps at the start, F >= 2. Step F-2 is the reference of the relative noise.
        refresh_every: after them, every so-manieth step is full as well (`schedule`); 0 is the paper's: none.

        policy: how the tokens are chosen; the paper's is CAT.
        reuse: what the others contribute; the paper's is REPEAT.

    The ones to tinker with:
        num_clusters: clusters of KMeans, at most the number of image tokens.
        noise_scale: weight of the relative noise against the position in the features of KMeans.
        fresh_fraction: share of a later selection that goes by relative noise; the rest goes to stale tokens.
        staleness_decay: f <- decay * f + [selected], in [0, 1).
        pooling: how a cluster's relative noise is pooled for its score.
        first_quota: most that one cluster gives to the first selection, as a fraction of the kept tokens.
        fresh_quotas: the same for later selections, by rank of the cluster; the last one serves all further ranks.
        kmeans_iterations: Lloyd iterations, a fixed number.
        extra_full_steps: steps (0-based, >= full_steps) that run full as well, by their numbers; none in the paper.

    Raises:
        SettingsError: a value is outside its domain.
    """

    keep_ratio: float = 0.3
    full_steps: int = 8
    refresh_every: int = 0
    policy: Policy = Policy.CAT
    reuse: Reuse = Reuse.REPEAT
    num_clusters: int = 20
    noise_scale: float = 0.05
    fresh_fraction: float = 0.25
    staleness_decay: float = 0.5
    pooling: Pooling = Pooling.MAX
    first_quota: float = 0.10
    fresh_quotas: tuple[float, ...] = (0.15, 0.10, 0.05)
    kmeans_iterations: int = 10
    extra_full_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(0.0 <= self.keep_ratio <= 1.0, "keep_ratio", self.keep_ratio, "a number in [0, 1]")
        _check(_is_int(self.full_steps) and self.full_steps >= 2, "full_steps", self.full_steps, "an integer >= 2")
        _check(
            _is_int(self.refresh_every) and self.refresh_every >= 0,
            "refresh_every",
            self.refresh_every,
            "an integer >= 1, or 0 for none",
        )
        _check(self.policy in set(Policy), "policy", self.policy, f"one of {', '.join(Policy)}")
        _check(self.reuse in set(Reuse), "reuse", self.reuse, f"one of {', '.join(Reuse)}")
        _check(
            _is_int(self.num_clusters) and self.num_clusters >= 1, "num_clusters", self.num_clusters, "an integer >= 1"
        )
        _check(
            math.isfinite(self.noise_scale) and self.noise_scale >= 0.0,
            "noise_scale",
            self.noise_scale,
            "a number >= 0",
        )
        _check(0.0 <= self.fresh_fraction <= 1.0, "fresh_fraction", self.fresh_fraction, "a number in [0, 1]")
        _check(0.0 <= self.staleness_decay < 1.0, "staleness_decay", self.staleness_decay, "a number in [0, 1)")
        _check(self.pooling in set(Pooling), "pooling", self.pooling, f"one of {', '.join(Pooling)}")
        _check(0.0 < self.first_quota <= 1.0, "first_quota", self.first_quota, "a number in (0, 1]")
        _check(
            len(self.fresh_quotas) > 0 and all(0.0 < q <= 1.0 for q in self.fresh_quotas),
            "fresh_quotas",
            self.fresh_quotas,
            "one or more numbers in (0, 1]",
        )
        _check(
            _is_int(self.kmeans_iterations) and self.kmeans_iterations >= 1,
            "kmeans_iterations",
            self.kmeans_iterations,
            "an integer >= 1",
        )
        _check(
            all(_is_int(step) and step >= self.full_steps for step in self.extra_full_steps),
            "extra_full_steps",
            self.extra_full_steps,
            f"integers >= full_steps ({self.full_steps})",
        )
        # What came from JSON or a careless caller gets the declared types; frozen, so through object.
        object.__setattr__(self, "policy", Policy(self.policy))
        object.__setattr__(self, "reuse", Reuse(self.reuse))
        object.__setattr__(self, "pooling", Pooling(self.pooling))
        object.__setattr__(self, "fresh_quotas", tuple(self.fresh_quotas))
        object.__setattr__(self, "extra_full_steps", tuple(self.extra_full_steps))

    @property
    def reference_step(self) -> int:
        """t0 = F - 2, the step (0-based) whose noise is the reference of the relative noise."""
        return self.full_steps - 2

    def num_kept(self, num_tokens: int) -> int:
        """n, the tokens that a pruned step computes: floor(keep_ratio * N), at least 1 but where keep_ratio is 0.

        The paper's own count: 1228 of 4096 at 0.3. The small term keeps 0.29 * 100 from becoming 28.

        Raises:
            ShapeError: the image has fewer tokens than there are clusters.
        """
        if num_tokens < self.num_clusters:
            raise ShapeError(
                f"the image has {num_tokens} tokens, fewer than num_clusters={self.num_clusters}",
                f"use a larger resolution or num_clusters <= {num_tokens}",
            )
        return max(1, math.floor(self.keep_ratio * num_tokens + 1e-6)) if self.keep_ratio else 0

    def refreshed(self) -> Self:
        """A third of the tokens, half of the full steps at the start, then every third step full, reuse extrapolated.

        What is saved on tokens goes into full steps: of 28 steps, the defaults become 12 full ones with 0.1 of the
        tokens between them, for the same MACs to 2 % on sd3-mini, and there for a third of the latents' error
        (benchmarks/RESULTS.md). On another model, count (`cat-eval` does) and choose the interval.
        """
        return self.replace(
            keep_ratio=self.keep_ratio / 3,
            full_steps=max(2, self.full_steps // 2),
            refresh_every=3,
            extra_full_steps=(),
            reuse=Reuse.EXTRAPOLATE,
        )

    def forecast(self) -> Self:
        """Half of the full steps at the start, then every second step full; between them nothing is computed.

        What the last two full steps predict is extrapolated to the step between. Of 28 steps, the defaults become 16
        full ones, for the MACs of the paper's settings, and on sd3-mini for a seventh of the latents' error
        (benchmarks/RESULTS.md; of 12 steps it gains nothing). For another cost, choose `full_steps` and
        `refresh_every`, as `cat-eval` does.
        """
        return self.replace(
            keep_ratio=0.0,
            full_steps=max(2, self.full_steps // 2),
            refresh_every=2,
            extra_full_steps=(),
            reuse=Reuse.EXTRAPOLATE,
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; validated like a new one."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            SettingsError: an unknown field, or a value of the wrong type or outside its domain.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise SettingsError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        try:
            return cls(**fields)
        except TypeError as error:
            raise SettingsError(f"settings of the wrong type: {error}") from error


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise SettingsError(f"{name}={value!r}: expected {expected}")
