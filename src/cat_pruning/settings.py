"""The settings of CAT pruning: one frozen dataclass, validated once."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from cat_pruning.checked import shown
from cat_pruning.errors import SettingsError, ShapeError
from cat_pruning.schedule import Schedule, StepKind

_Settings = TypeVar("_Settings")


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
    EXTRAPOLATE = "extrapolate"  # the line through the outputs of the last two full steps


class Pooling(StrEnum):
    """How the relative noise of a cluster's tokens becomes one vector per cluster."""

    MAX = "max"  # signed maximum, channel by channel
    MEAN = "mean"


class Preset(StrEnum):
    """Settings that have a name. See `PruneSettings.preset`."""

    PAPER = "paper"
    REFRESHED = "refreshed"
    FORECAST = "forecast"


# What each preset changes of the defaults, which are the paper's.
PRESETS: Mapping[Preset, Mapping[str, Any]] = MappingProxyType(
    {
        Preset.PAPER: {},
        Preset.REFRESHED: {"keep_ratio": 0.1, "full_steps": 4, "refresh_every": 3, "reuse": Reuse.EXTRAPOLATE},
        Preset.FORECAST: {"keep_ratio": 0.0, "full_steps": 4, "refresh_every": 2, "reuse": Reuse.EXTRAPOLATE},
    }
)


def _one_of(names: type[StrEnum]) -> str:
    return f"one of {', '.join(names)}"


# A field's description is what an error says that it expected.
Fraction = Annotated[float, Field(ge=0.0, le=1.0, description="a number in [0, 1]")]
Decay = Annotated[float, Field(ge=0.0, lt=1.0, description="a number in [0, 1)")]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False, description="a finite number >= 0")]
Quota = Annotated[float, Field(gt=0.0, le=1.0, description="a number in (0, 1]")]
Quotas = Annotated[tuple[Quota, ...], Field(strict=False, min_length=1, description="one or more numbers in (0, 1]")]
Count = Annotated[int, Field(ge=1, description="an integer >= 1")]
FullSteps = Annotated[int, Field(ge=2, description="an integer >= 2")]
Interval = Annotated[int, Field(ge=0, description="an integer >= 1, or 0 for none")]
Table = Annotated[Schedule | None, Field(description="a Schedule")]


def _refuse_with_settings_errors(cls: type[_Settings]) -> type[_Settings]:
    """Give a pydantic dataclass an `__init__` that raises our own error, in one line."""
    pydantic_init: Callable[..., None] = cls.__init__

    @functools.wraps(pydantic_init)
    def __init__(self: _Settings, **fields: Any) -> None:
        try:
            pydantic_init(self, **fields)
        except ValidationError as error:
            raise SettingsError(_first_problem(cls, fields, error)) from None

    cls.__init__ = __init__  # type: ignore[assignment]
    return cls


def _first_problem(cls: Any, fields: Mapping[str, Any], error: ValidationError) -> str:
    """What came and what was expected. Unknown fields come before values that were refused."""
    known = cls.__pydantic_fields__
    if unknown := sorted(set(fields) - set(known)):
        return f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}"
    problem = error.errors()[0]
    if not problem["loc"]:  # fields that do not go together
        return str(problem["ctx"]["error"])
    name = str(problem["loc"][0])
    expected = problem.get("ctx", {}).get("error") or known[name].description
    return f"{name}={fields[name]!r}: expected {expected}"


@_refuse_with_settings_errors
@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class PruneSettings:
    """What to compute on which step (Cheng, Chen, Jia 2025, algorithm 2). The defaults are the paper's.

    The first five matter; the others are there to tinker with. A refusal names the field, the value and what was
    expected.

    Attributes:
        keep_ratio: fraction of the image tokens that a pruned step computes, in [0, 1]; 1 is the unpruned model. 0
            computes nothing at all, the text's rows neither, as the preset `forecast` does.
        full_steps: full steps at the start, F >= 2. Step F-2 is the reference of the relative noise.
        refresh_every: after them, every K-th step is full as well (`timeline`); 0 is the paper's: none.
        policy: how the tokens are chosen; the paper's is CAT.
        reuse: what the others contribute; the paper's is REPEAT. EXTRAPOLATE needs `refresh_every`: far from the full
            steps, the line through them leads away from the image.
        num_clusters: clusters of KMeans, at most the number of image tokens.
        noise_scale: weight of the relative noise against the position in the features of KMeans.
        fresh_fraction: share of a later selection that goes by relative noise; the rest goes to stale tokens.
        staleness_decay: f <- decay * f + [selected], in [0, 1).
        pooling: how a cluster's relative noise is pooled for its score.
        first_quota: most that one cluster gives to the first selection, as a fraction of the kept tokens.
        fresh_quotas: the same for later selections, by rank of the cluster; the last one serves all further ranks.
        kmeans_iterations: Lloyd iterations, a fixed number.
        schedule: a table that says of every step what it computes, instead of the three settings `full_steps`,
            `refresh_every` and `reuse`. None: those say it.

    Raises:
        SettingsError: a value is outside its domain, or there is no such field.
    """

    keep_ratio: Fraction = 0.3
    full_steps: FullSteps = 8
    refresh_every: Interval = 0
    policy: Policy = Field(default=Policy.CAT, strict=False, description=_one_of(Policy))
    reuse: Reuse = Field(default=Reuse.REPEAT, strict=False, description=_one_of(Reuse))
    num_clusters: Count = 20
    noise_scale: Weight = 0.05
    fresh_fraction: Fraction = 0.25
    staleness_decay: Decay = 0.5
    pooling: Pooling = Field(default=Pooling.MAX, strict=False, description=_one_of(Pooling))
    first_quota: Quota = 0.10
    fresh_quotas: Quotas = (0.15, 0.10, 0.05)
    kmeans_iterations: Count = 10
    schedule: Table = None

    @model_validator(mode="after")
    def _near_full_steps(self) -> Self:
        if self.reuse is Reuse.EXTRAPOLATE and not self.refresh_every:
            raise ValueError(f"reuse='{self.reuse}': expected {Reuse.REPEAT} where refresh_every is 0")
        return self

    @classmethod
    def tuned(cls, schedule: Schedule, **changes: Any) -> Self:
        """The settings of a schedule, as `cat-tune` fits them.

        Raises:
            SettingsError: a value is outside its domain, or this is no schedule.
        """
        if schedule is None:
            raise SettingsError("schedule=None: expected a Schedule")
        return cls(**{"schedule": schedule, **changes})

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The settings called `name`, with some fields changed.

        * `paper`: 8 full steps, then 0.3 of the tokens on every step. These are the defaults.
        * `refreshed`: 4 full steps, then every 3rd step full, 0.1 of the tokens on the steps between, and the output of
          the others extrapolated. Of 28 steps 12 are full. It costs the MACs of `paper` to 2 % on sd3-mini, for a
          third of the latents' error there.
        * `forecast`: 4 full steps, then every 2nd step full, and nothing computed between: the output is extrapolated
          from the last two full steps. Of 28 steps 16 are full. It costs the MACs of `paper`, for a seventh of the
          latents' error on sd3-mini; of 12 steps it gains nothing.

        The numbers are of benchmarks/RESULTS.md. For another cost, change `full_steps` and `refresh_every`.

        Raises:
            SettingsError: there is no such preset, or a value is outside its domain.
        """
        if name not in list(Preset):
            raise SettingsError(f"preset {name!r} is not known; known are {', '.join(Preset)}")
        return cls(**{**PRESETS[Preset(name)], **changes})

    @property
    def prunes(self) -> bool:
        """Whether there may be steps that compute some tokens and not all."""
        table = self.schedule
        scheduled = table is None or any(step.kind is StepKind.PRUNED for step in table.steps)
        return self.keep_ratio > 0.0 and scheduled

    def num_kept(self, num_tokens: int) -> int:
        """n, the tokens that a pruned step computes: floor(keep_ratio * N), at least 1; 0 where no step is pruned.

        The paper's own count: 1228 of 4096 at 0.3. The small term keeps 0.29 * 100 from becoming 28.

        Raises:
            ShapeError: the image has fewer tokens than there are clusters.
        """
        if not self.prunes:
            return 0
        if num_tokens < self.num_clusters:
            raise ShapeError(
                f"the image has {num_tokens} tokens, fewer than num_clusters={self.num_clusters}",
                f"use a larger resolution or num_clusters <= {num_tokens}",
            )
        return max(1, math.floor(self.keep_ratio * num_tokens + 1e-6))

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; validated like a new one."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"schedule": self.schedule.model_dump(mode="json") if self.schedule else None}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            SettingsError: an unknown field, or a value of the wrong type or outside its domain.
        """
        if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
            raise SettingsError(f"settings={shown(fields)}: expected fields by their names")
        if isinstance(table := fields.get("schedule"), Mapping):
            fields = {**fields, "schedule": Schedule.from_dict(table)}
        return cls(**fields)


def check_settings(settings: object) -> None:
    """That these are settings.

    Raises:
        SettingsError: they are a dict, a preset's name, a schedule.
    """
    if not isinstance(settings, PruneSettings):
        raise SettingsError(
            f"settings={shown(settings)}: expected an instance of PruneSettings",
            "make it: PruneSettings(keep_ratio=…), PruneSettings.preset(name), PruneSettings.tuned(schedule)",
        )
