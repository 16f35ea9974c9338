"""A schedule: the table that says what each step of an image computes, and what it is made of where it does not.

The output of step k is

    out[k] = what the step computes           on its tokens: all, some, or of a forecast none
    out[k] = Σ_j weights[j] · out[j], j < k   on the others

Without weights the others keep what was last computed of them, as in CAT Pruning (Cheng, Chen, Jia 2025,
algorithm 1). A forecast whose weights continue a line is a first-order TaylorSeer (Liu et al. 2025, arXiv 2503.06923)
of the output alone; `cat_pruning.tuning` fits the weights to a model. Under a scheduler that is linear in the outputs,
as Euler's is, a schedule of full steps and forecasts is a linear multistep method on the full steps, with coefficients
of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from cat_pruning.checked import checked
from cat_pruning.checked import shown as shown_value
from cat_pruning.errors import ScheduleError
from cat_pruning.files import parse_json, read_text, write_whole

SCHEDULE_VERSION: Final = 1
_TOLERANCE: Final = 1e-4  # of the first timestep: what two versions of a scheduler may round apart


class StepKind(StrEnum):
    """What one call of the transformer computes."""

    FULL = "full"  # every image token
    PRUNED = "pruned"  # the kept tokens
    FORECAST = "forecast"  # nothing


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


_LARGEST: Final = 1e6  # of a weight: sums in float32 stay finite
_Weights = dict[Annotated[int, Field(ge=0, strict=False)], Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]]


class ScheduledStep(_Model):
    """A row of the table.

    Attributes:
        kind: what is computed.
        weights: of earlier steps' outputs, by the steps' numbers; empty: what was last computed again.
        negative: the same for the negative prompt's rows of a batch under guidance, of the same steps; empty: as
            `weights`. The two rows change differently, and guidance magnifies what differs.
    """

    kind: Annotated[StepKind, Field(strict=False)]
    weights: _Weights = Field(default_factory=dict)
    negative: _Weights = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind is StepKind.FULL and self.weights:
            raise ValueError("a full step takes no weights")
        if self.negative and self.negative.keys() != self.weights.keys():
            raise ValueError(f"negative has weights of {[*self.negative]}, expected of {[*self.weights]}")
        return self


FULL_STEP: Final = ScheduledStep(kind=StepKind.FULL)


class MadeFor(_Model):
    """What a schedule was fitted to: of the model its class and config; of the run all that its errors depend on."""

    transformer_class: str
    config_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scheduler: str
    guidance_scale: float
    height: PositiveInt
    width: PositiveInt
    prompts: PositiveInt  # recordings that it was fitted to


class Measured(_Model):
    """What a schedule's images cost and how they differ from the full run's, on prompts that it was not fitted to.

    Attributes:
        speedup: MACs of the full run over those of this one.
        predicted_error: what the search expected of `error`.
        error: relative error of the final latents, mean over the images. half_width: of its 95 % interval.
        prompts: images that it was measured on.
    """

    speedup: PositiveFloat
    predicted_error: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    error: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    half_width: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    prompts: PositiveInt


class Schedule(_Model):
    """The steps of an image, for one sequence of timesteps.

    Attributes:
        steps: the rows. The first is full; a row reads outputs of earlier rows that compute something.
        timesteps: as the transformer is called with them, one a row, strictly monotonic; None: rows go by their number.
        made_for, measured: of a fitted schedule.

    Raises:
        ScheduleError: from `load` and `of`, where the rows make no schedule; pydantic's own from the constructor.
    """

    format_version: Annotated[int, Field(ge=SCHEDULE_VERSION, le=SCHEDULE_VERSION)] = SCHEDULE_VERSION
    steps: Annotated[tuple[ScheduledStep, ...], Field(strict=False, min_length=1)]
    timesteps: (
        Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], Field(strict=False, min_length=1)] | None
    ) = None
    made_for: MadeFor | None = None
    measured: Measured | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps[0].kind is not StepKind.FULL:
            raise ValueError(f"step 0 is {self.steps[0].kind}: the first step has to be full")
        for number, step in enumerate(self.steps):
            for read in step.weights:
                if read >= number or self.steps[read].kind is StepKind.FORECAST:
                    raise ValueError(f"step {number} reads step {read}: expected earlier steps that compute something")
        if self.timesteps is not None:
            if len(self.timesteps) != len(self.steps):
                raise ValueError(f"{len(self.timesteps)} timesteps for {len(self.steps)} steps")
            signs = {math.copysign(1, b - a) if a != b else 0 for a, b in itertools.pairwise(self.timesteps)}
            if len(signs - {0}) > 1 or 0 in signs:
                raise ValueError("the timesteps neither fall nor rise throughout")
        return self

    @classmethod
    def of(
        cls,
        num_steps: int,
        full: Iterable[int],
        weights: Mapping[int, Mapping[int, float]] | None = None,
        negative: Mapping[int, Mapping[int, float]] | None = None,
        *,
        pruned: Iterable[int] = (),
        **fields: Any,
    ) -> Self:
        """The schedule with these full and pruned steps, and forecasts between them.

        Args:
            num_steps: rows.
            full: numbers of the full steps.
            weights: of the steps that are not full, by their numbers; a step that has none repeats the last output.
            negative: of their negative rows.
            pruned: numbers of the pruned steps.
            fields: the other fields.

        Raises:
            ScheduleError: the rows make no schedule.
        """
        try:
            full, pruned, every = set(full), set(pruned), set(range(num_steps))
            weights, negative = (
                {number: dict(row) for number, row in dict(given or {}).items()} for given in (weights, negative)
            )
        except (TypeError, ValueError) as error:
            raise ScheduleError(
                f"a schedule cannot be made of these ({error})",
                "give a number of steps, the numbers of the full ones, and weights by step: Schedule.of(6, [0, 2], "
                "{1: {0: 1.0}})",
            ) from error
        if strange := (full | pruned | set(weights) | set(negative)) - every:
            raise ScheduleError(
                f"steps {sorted(strange, key=str)} of {num_steps}", f"give numbers from 0 to {num_steps - 1}"
            )

        def made() -> Any:
            return cls(steps=tuple(row(number, kind) for number, kind in enumerate(kinds)), **fields)

        def row(number: int, kind: StepKind) -> ScheduledStep:
            if kind is StepKind.FULL:
                return FULL_STEP
            return ScheduledStep(kind=kind, weights=weights.get(number, {}), negative=negative.get(number, {}))

        kinds = [_kind(number, full, pruned) for number in range(num_steps)]
        return cls._validated("a schedule", made)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Self:
        """Read a schedule that `save` wrote.

        Raises:
            ScheduleError: there is none, or it is damaged or was edited into one that makes no sense.
        """
        try:
            text = read_text(Path(path))
            fields = parse_json(text)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or f"it is no schedule's JSON: {error}"
            raise ScheduleError(f"{path} cannot be read ({reason})", "give a schedule that cat-tune wrote") from error
        if not isinstance(fields, dict):
            raise ScheduleError(
                f"{path} is no schedule: {shown_value(fields)}, expected an object", "make it with cat-tune"
            )
        version = fields.get("format_version")
        if type(version) is not int or version != SCHEDULE_VERSION:
            raise ScheduleError(
                f"{path} has format version {version!r}, this cat-pruning reads version {SCHEDULE_VERSION}",
                "make it again with cat-tune",
            )
        return cls._validated(str(path), lambda: cls.model_validate_json(text))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `model_dump(mode="json")`.

        Raises:
            ScheduleError: the rows make no schedule.
        """
        try:
            text = json.dumps(fields)
        except (TypeError, ValueError, RecursionError) as error:
            raise ScheduleError(
                f"a schedule is no JSON data ({error})", "give what model_dump(mode='json') returned"
            ) from error
        return cls._validated("a schedule", lambda: cls.model_validate_json(text))

    @classmethod
    def _validated(cls, what: str, made: Any) -> Self:
        try:
            schedule: Self = made()
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = ".".join(map(str, fault["loc"]))
            message = fault["msg"].removeprefix("Value error, ")
            raise ScheduleError(
                f"{what} is no valid schedule: {place + ': ' if place else ''}{message}", "make it with cat-tune"
            ) from error
        return schedule

    @checked
    def save(self, path: str | Path) -> None:
        """Write it as JSON, a row a line, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        write_whole(Path(path), self.to_json())

    def to_json(self) -> str:
        """The text of the file, a row of the table a line."""
        fields = self.model_dump(mode="json", exclude_none=True)
        rows = [json.dumps({name: value for name, value in step.items() if value}) for step in fields.pop("steps")]
        rest = json.dumps(fields, indent=2)
        return rest.removesuffix("\n}") + ',\n  "steps": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.to_json())

    @property
    def num_steps(self) -> int:
        """Rows."""
        return len(self.steps)

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The numbers of the full steps."""
        return tuple(number for number, step in enumerate(self.steps) if step.kind is StepKind.FULL)

    @property
    def name(self) -> str:
        """What it is called in a bundle: 28-9 has 28 steps, 9 of them full."""
        return f"{self.num_steps}-{len(self.full_steps)}"

    @cached_property
    def last_read(self) -> dict[int, int]:
        """By the number of a step, the last step that reads its output."""
        return {read: number for number, step in enumerate(self.steps) for read in step.weights}

    def check_model(self, transformer_class: str, config: Mapping[str, Any]) -> None:
        """Check that the schedule is for this model, as far as its class and config tell.

        Raises:
            ScheduleError: it was made for another.
        """
        if self.made_for is None:
            return
        expected, remedy = self.made_for.transformer_class, "tune one for this model: cat-tune"
        if transformer_class != expected:
            raise ScheduleError(f"the schedule {self.name} is for a {expected}, this is a {transformer_class}", remedy)
        digest = config_sha256(config)
        if digest != self.made_for.config_sha256:
            raise ScheduleError(
                f"the schedule {self.name} is for a {expected} whose config has the hash "
                f"{self.made_for.config_sha256[:12]}, this one's has {digest[:12]}",
                remedy,
            )

    @cached_property
    def _row_of(self) -> dict[float, int]:
        return {timestep: row for row, timestep in enumerate(self.timesteps or ())}

    def number_at(self, timestep: float, precision: float = 0.0) -> int:
        """The row of a timestep.

        Args:
            timestep: as the transformer was called with it.
            precision: machine epsilon of the dtype that it came in.

        Raises:
            ScheduleError: no row has it.
        """
        assert self.timesteps is not None
        if (row := self._row_of.get(timestep)) is not None:
            return row
        number = min(range(self.num_steps), key=lambda row: abs(self.timesteps[row] - timestep))  # type: ignore[index]
        tolerance = max(precision, _TOLERANCE) * max(map(abs, self.timesteps))
        if abs(self.timesteps[number] - timestep) > tolerance:
            refusal = self._other_timesteps(f"this run has a step at timestep {timestep:g}")
            move = "or, where its timesteps are known, move it to them: cat_pruning.moved_schedule.move"
            raise ScheduleError(refusal.problem, f"{refusal.remedy}, {move}")
        return number

    def check_timesteps(self, timesteps: Sequence[float], precision: float = 0.0) -> None:
        """Check the timesteps of a whole run, which may begin late, as image-to-image does.

        Raises:
            ScheduleError: one of them has no row.
        """
        if self.timesteps is None:
            return
        levels = [timestep for timestep, _ in itertools.groupby(timesteps)]
        if len(levels) > self.num_steps:
            raise self._other_timesteps(f"this run has {len(levels)}")
        try:
            for timestep in levels:
                self.number_at(timestep, precision)
        except ScheduleError:
            raise self._other_timesteps(f"this run has {len(levels)} steps ({shown(levels)})") from None

    def _other_timesteps(self, found: str) -> ScheduleError:
        assert self.timesteps is not None
        scheduler = f" of {self.made_for.scheduler}" if self.made_for else ""
        return ScheduleError(
            f"the schedule {self.name} is for the {self.num_steps} steps{scheduler} at timesteps "
            f"{shown(self.timesteps)}; {found}",
            f"call the pipeline with num_inference_steps={self.num_steps} and the scheduler that it was tuned for, "
            "or tune it for yours: cat-tune --steps",
        )


def config_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of a diffusers config, without what says where it is from, who wrote it and how weights are quantised."""
    told = {name: value for name, value in config.items() if name[0] != "_" and name != "quantization_config"}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _kind(number: int, full: set[int], pruned: set[int]) -> StepKind:
    if number in full:
        return StepKind.FULL
    return StepKind.PRUNED if number in pruned else StepKind.FORECAST


def shown(timesteps: Sequence[float]) -> str:
    """The first timesteps and the last one."""
    if len(timesteps) <= 3:
        return ", ".join(f"{timestep:g}" for timestep in timesteps)
    return f"{timesteps[0]:g}, {timesteps[1]:g} … {timesteps[-1]:g}"
