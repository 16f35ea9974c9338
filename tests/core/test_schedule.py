from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cat_pruning.errors import ScheduleError, SettingsError
from cat_pruning.schedule import MadeFor, Measured, Schedule, StepKind
from cat_pruning.settings import PruneSettings

TIMESTEPS = (1000.0, 750.0, 500.0, 250.0)
MADE_FOR = MadeFor(
    transformer_class="SD3Transformer2DModel",
    config_sha256="0" * 64,
    scheduler="FlowMatchEulerDiscreteScheduler",
    guidance_scale=3.0,
    height=128,
    width=128,
    prompts=24,
)
MEASURED = Measured(speedup=1.33, predicted_error=0.01, error=0.012, half_width=0.001, prompts=16)


def make(**changes: Any) -> Schedule:
    fields: dict[str, Any] = {"timesteps": TIMESTEPS, "made_for": MADE_FOR, "measured": MEASURED}
    return Schedule.of(4, (0, 1, 3), {2: {0: -0.9, 1: 1.95}}, **fields | changes)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    schedule = make()
    schedule.save(tmp_path / "a.json")
    assert Schedule.load(tmp_path / "a.json") == schedule
    assert hash(Schedule.load(tmp_path / "a.json")) == hash(schedule)
    assert (tmp_path / "a.json").read_text().count('{"kind"') == 4  # a row a line, for people


def test_settings_carry_it_through_json() -> None:
    settings = PruneSettings.tuned(make(), keep_ratio=0.2)
    assert PruneSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_settings_of_a_schedule_without_pruned_steps_keep_no_tokens() -> None:
    assert PruneSettings.tuned(make()).num_kept(12) == 0  # fewer tokens than clusters, which nothing needs
    assert PruneSettings.tuned(Schedule.of(3, (0, 1), pruned=(2,))).num_kept(100) == 30


def test_its_name_and_full_steps() -> None:
    assert make().name == "4-3"
    assert make().full_steps == (0, 1, 3)
    assert [step.kind for step in make().steps][2] is StepKind.FORECAST
    assert make().last_read == {0: 2, 1: 2}


@pytest.mark.parametrize(
    ("full", "weights", "reason"),
    [
        ((1, 2), {}, "the first step has to be full"),
        ((0,), {1: {2: 1.0}}, "step 1 reads step 2"),
        ((0,), {2: {1: 1.0}}, "step 1: expected earlier steps that compute something"),
        ((0,), {1: {0: float("nan")}}, "finite"),
        ((0, 4), {}, "give numbers from 0 to 3"),
        ((0,), {7: {0: 1.0}}, "give numbers from 0 to 3"),
    ],
)
def test_rows_that_make_no_schedule_are_refused(full: tuple[int, ...], weights: Any, reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        Schedule.of(4, full, weights)


def test_negative_weights_are_of_the_same_steps() -> None:
    made = Schedule.of(3, (0, 1), {2: {0: -1.0, 1: 2.0}}, {2: {0: -0.5, 1: 1.5}})
    assert Schedule.from_dict(json.loads(made.to_json())) == made
    with pytest.raises(ScheduleError, match=r"negative has weights of \[1\], expected of \[0, 1\]"):
        Schedule.of(3, (0, 1), {2: {0: -1.0, 1: 2.0}}, {2: {1: 1.0}})


@pytest.mark.parametrize("timesteps", [(3.0, 2.0, 1.0), (3.0, 2.0, 2.0, 1.0), (3.0, 2.0, 2.5, 1.0)])
def test_timesteps_that_do_not_fit_are_refused(timesteps: tuple[float, ...]) -> None:
    with pytest.raises(ScheduleError, match="timesteps"):
        make(timesteps=timesteps)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda fields: fields.update(format_version=9), "format version 9"),
        (lambda fields: fields["steps"][0].update(kind="pruned"), "the first step has to be full"),
        (lambda fields: fields["steps"][3].update(weights={"1": 1.0}), "a full step takes no weights"),
        (lambda fields: fields["steps"].pop(), "4 timesteps for 3 steps"),
        (lambda fields: fields.update(more=1), "more: Extra inputs"),
        (lambda fields: fields["steps"][2]["weights"].update({"1": "x"}), "steps.2.weights.1"),
        (lambda fields: fields["measured"].update(error=-1.0), "measured.error"),
        (lambda fields: fields["measured"].update(speedup=math.inf), "measured.speedup: Input should be a finite"),
        (lambda fields: fields["made_for"].update(guidance_scale=math.nan), "guidance_scale: Input should be a finite"),
        (lambda fields: fields.update(format_version=True), "format version True"),
        (lambda fields: fields.update(format_version=1.0), "format version 1.0"),
        (lambda fields: fields["steps"][2]["weights"].update({"1": 1e308}), "weights.1: .*less than or equal"),
    ],
)
def test_an_edited_file_is_refused_in_a_line(tmp_path: Path, edit: Any, reason: str) -> None:
    fields = json.loads(make().to_json())
    edit(fields)
    (tmp_path / "a.json").write_text(json.dumps(fields))
    with pytest.raises(ScheduleError, match=reason) as caught:
        Schedule.load(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    assert "cat-tune" in caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{", b"[" * 100_000])
def test_a_file_that_is_no_schedule_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ScheduleError, match=r"cannot be read|is no schedule: \[\], expected an object"):
        Schedule.load(tmp_path / "a.json")
    with pytest.raises(ScheduleError, match="No such file"):
        Schedule.load(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_what_is_no_name_of_a_file_is_not_written(name: str) -> None:
    with pytest.raises(OSError, match="this is no name of a file"):
        make().save(name)


@pytest.mark.parametrize("steps", [{1}, [object()], {(0,): 1}])
def test_a_schedule_of_no_json_data_is_refused(steps: Any) -> None:
    with pytest.raises(SettingsError, match="a schedule is no JSON data"):
        PruneSettings.from_dict({"schedule": {"steps": steps}})


def test_a_timestep_finds_its_row() -> None:
    assert [make().number_at(timestep) for timestep in (1000.0, 750.04, 250.0)] == [0, 1, 3]
    assert make().number_at(752.0, precision=2**-7) == 1  # as bfloat16 has it
    with pytest.raises(ScheduleError, match="this run has a step at timestep 752"):
        make().number_at(752.0)


@pytest.mark.parametrize(
    "timesteps", [TIMESTEPS, (), TIMESTEPS[2:], (1000.0, 750.0, 750.0, 500.0, 500.0, 250.0, 250.0)]
)
def test_the_timesteps_it_was_made_for_fit(timesteps: tuple[float, ...]) -> None:
    """Late beginnings, and Heun's two calls at a timestep too."""
    make().check_timesteps(timesteps)


def test_other_timesteps_are_refused_with_both_named() -> None:
    with pytest.raises(ScheduleError) as caught:
        make().check_timesteps((1000.0, 600.0, 300.0))
    assert "4-3 is for the 4 steps of FlowMatchEulerDiscreteScheduler at timesteps 1000, 750 … 250" in str(caught.value)
    assert "this run has 3 steps (1000, 600, 300)" in caught.value.problem
    assert "num_inference_steps=4" in caught.value.remedy
    with pytest.raises(ScheduleError, match="this run has 5"):
        make().check_timesteps((1000.0, 900.0, 750.0, 500.0, 250.0))


def test_anything_else_as_a_schedule_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="schedule='fast': expected a Schedule"):
        PruneSettings(schedule="fast")  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="no valid schedule"):
        PruneSettings.from_dict({"schedule": {"steps": []}})
