"""`cat-tune`, run on the miniature as its users run it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.schedules import read_schedules
from cat_pruning.errors import SettingsError
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.schedule import Schedule
from cat_pruning.tools import generate_cli
from cat_pruning.tuning import cli
from cat_pruning.tuning.arguments import budgets_of, parse
from cat_pruning.tuning.worker import scheduler_of

CAPTION = "a large red circle above a small blue star on a plain black background"
OPTIONS = [
    *("--guidance-scale", "3", "--steps", "8", "--full", "5,3", "--prompts", "scenes:4", "--measure", "scenes:2"),
    *("--engine", "onnxruntime", "--resolution", "64x64"),
]


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


def copied(bundle: Path, to: Path) -> Path:
    """A bundle of its own, whose files are the same on disk."""
    shutil.copytree(bundle, to, copy_function=os.link)
    return to


@pytest.fixture(scope="module")
def tuned(mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = copied(mini_bundle, tmp_path_factory.mktemp("tuned") / "mini")
    assert run(bundle, *OPTIONS) == 0
    shutil.copy(bundle.with_name("mini.tune") / "tune.json", bundle.with_name("first.json"))  # later runs write it anew
    return bundle


@pytest.fixture(scope="module")
def schedules(tuned: Path) -> dict[str, Schedule]:
    return read_schedules(Bundle.open(tuned))


@pytest.mark.long
def test_the_bundle_has_what_was_asked_for(schedules: dict[str, Schedule]) -> None:
    assert [*schedules] == ["8-5", "8-3"]
    for name, full in (("8-5", 5), ("8-3", 3)):
        schedule = schedules[name]
        assert len(schedule.full_steps) == full
        assert schedule.timesteps is not None
        assert schedule.timesteps[0] == 1000.0
        assert schedule.made_for is not None
        assert (schedule.made_for.scheduler, schedule.made_for.guidance_scale) == ("FlowMatchEulerDiscreteScheduler", 3)
        forecasts = [step for step in schedule.steps if step.weights]
        assert len(forecasts) == 8 - full
        assert all(step.negative.keys() == step.weights.keys() for step in forecasts)


@pytest.mark.long
def test_it_is_nearer_to_the_full_run_than_anything_else_at_its_cost(
    tuned: Path, schedules: dict[str, Schedule]
) -> None:
    found = json.loads(tuned.with_name("first.json").read_text())
    for budget in (5, 3):
        errors = {
            each["method"]: each["latents_error"]["mean"] for each in found["outcomes"] if each["budget"] == budget
        }
        assert errors.pop("tuned") < 0.7 * min(errors.values())
        assert {"forecast", "fewer steps", "cat"} <= errors.keys()
    measured = schedules["8-5"].measured
    assert measured is not None
    assert measured.speedup == pytest.approx(8 / 5, rel=0.02)
    assert measured.error < 0.1
    assert found["fitted_to"] == 4
    assert (tuned.with_name("mini.tune") / "tune.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_choices_are_tried_on_whole_batches(mini_bundle: Path, tmp_path: Path) -> None:
    """Of 16 recordings in batches of 5, 15 are."""
    bundle = copied(mini_bundle, tmp_path / "mini")
    options = ["--steps", "3", "--full", "2", "--prompts", "scenes:16", "--measure", "scenes:1", "--batch", "5"]
    assert run(bundle, *options, "--engine", "onnxruntime", "--resolution", "32x48", "--no-peers") == 0
    assert [*read_schedules(Bundle.open(bundle))] == ["3-2"]


@pytest.mark.long
def test_a_pipeline_takes_it_by_its_speed(tuned: Path) -> None:
    pipe = load_pipeline(tuned, "onnxruntime", speedup=1.6, steps=8)
    kinds = []
    pipe.transformer.register_forward_hook(lambda module, arguments, output: kinds.append(module.last_step.kind.value))
    pipe.set_progress_bar_config(disable=True)
    pipe(CAPTION, num_inference_steps=8, guidance_scale=3.0, height=64, width=64, max_sequence_length=24)
    assert kinds.count("full") == 5
    assert kinds.count("forecast") == 3


@pytest.mark.long
def test_cat_generate_takes_it_by_its_speed(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    common = [str(tuned), CAPTION, "-o", str(out), "--resolution", "64x64", "--engine", "onnxruntime"]
    assert generate_cli.main([*common, "--speedup", "2.5", "--steps", "8", "--guidance-scale", "4"]) == 0
    assert out.exists()
    assert "tuned at --guidance-scale 3" in capsys.readouterr().err
    assert generate_cli.main([*common, "--speedup", "2.5", "--steps", "9"]) == 2
    error = capsys.readouterr().err
    assert "no schedule of 9 steps that is 2.5 times as fast; there are 8 steps at 1.59, 8 steps at 2.63" in error
    assert f"cat-tune {tuned} --steps 9 --speedup 2.5" in error


@pytest.mark.long
def test_started_again_it_goes_on_with_what_was_recorded(
    tuned: Path, schedules: dict[str, Schedule], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = tuned.with_name("mini.tune") / "batch-0000.safetensors"
    before = recorded.stat().st_mtime_ns
    assert run(tuned, *OPTIONS, "--no-peers") == 0
    assert recorded.stat().st_mtime_ns == before
    assert read_schedules(Bundle.open(tuned)) == schedules


@pytest.mark.long
def test_recordings_of_another_run_are_refused(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Bundle.open(tuned)
    assert run(tuned, *OPTIONS, "--seed", "5", "--guidance-scale", "4") == 2
    error = capsys.readouterr().err
    assert "holds the recordings of a run with other guidance_scale, seed; give another --recordings" in error
    assert "\n" not in error.strip()
    assert Bundle.open(tuned) == before


@pytest.mark.long
def test_killed_it_leaves_the_bundle_as_it_was(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = copied(mini_bundle, tmp_path / "mini")
    before = sorted(path.relative_to(bundle) for path in bundle.rglob("*"))

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cat_pruning.tuning.fitting.fit_schedules", interrupt)
    assert run(bundle, *OPTIONS) == 130
    assert "recordings are kept" in capsys.readouterr().err
    assert sorted(path.relative_to(bundle) for path in bundle.rglob("*")) == before
    assert (tmp_path / "mini.tune" / "batch-0000.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--speedup", "2", "--full", "9"], "--speedup and --full are both given"),
        (["--speedup", "1"], "--speedup 1: expected numbers above 1"),
        (["--speedup", "nan"], "--speedup nan: expected numbers above 1"),
        (["--full", "1"], "--full: '1': expected a whole number from 2"),
        (["--full", "0"], "--full: '0': expected"),
        (["--steps", "2"], "--steps: '2': expected a whole number from 3"),
        (["--batch", "0"], "--batch: '0': expected"),
        (["--seed", "-1"], "--seed: '-1': expected"),
        (["--guidance-scale", "nan"], "--guidance-scale: 'nan': expected a number from -1000 to 1000"),
        (["--prompts", "scenes:3"], "--prompts scenes:3: 3 prompts; expected at least 4"),
        (["--prompts", "none.txt"], "none.txt cannot be read"),
        (["--measure", "scenes:0"], "scenes:0: expected scenes:N"),
        (["--recordings", __file__], "test_cli.py cannot be written (it is no directory); give another"),
        (["--recordings", "/"], "--recordings / cannot be written"),
    ],
)
def test_a_mistake_is_a_line_before_anything_is_loaded(
    options: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = run(tmp_path / "no-bundle", *options)
    except SystemExit as stopped:  # argparse's own
        code = int(stopped.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_prompts_that_are_fitted_to_are_not_measured_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n")
    (tmp_path / "b.txt").write_text("four\nfive\n")
    assert run(tmp_path / "b", "--prompts", tmp_path / "a.txt", "--measure", tmp_path / "b.txt") == 2
    assert "b.txt: 1 of its prompts are fitted to as well; measure on other prompts" in capsys.readouterr().err


def test_a_speedup_is_a_number_of_full_steps() -> None:
    def budgets(*options: str, steps: int = 28) -> tuple[int, ...]:
        return budgets_of(parse(["b", *options]), steps, lambda full: steps / full)

    assert budgets() == (14, 9, 7)  # 2, 3 and 4
    assert budgets("--speedup", "1.75,3.5") == (16, 8)
    assert budgets("--full", "9,16") == (16, 9)
    assert budgets("--speedup", "2", steps=50) == (25,)
    with pytest.raises(SettingsError, match="at least 2 are full, which is 14 times as fast"):
        budgets("--speedup", "20")
    with pytest.raises(SettingsError, match="--full 28: of 28 steps, expected from 2 to 27"):
        budgets("--full", "28")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SchedulerMixin", "diffusers has no such scheduler"),
        ("AutoencoderKL", "diffusers has no such scheduler"),
        ("__doc__", "diffusers has no such scheduler"),
        ("KarrasVeScheduler", "its steps need sigma_hat, sigma_prev, sample_hat, which no such pipeline has"),
        ("VQDiffusionScheduler", "it cannot be made from the pipeline's .*num_vec_classes"),
    ],
)
def test_a_scheduler_that_no_pipeline_takes(name: str, said: str) -> None:
    with pytest.raises(SettingsError, match=f"--scheduler {name}: {said}"):
        scheduler_of(name, FlowMatchEulerDiscreteScheduler())


def test_a_size_that_the_model_cannot_take_is_told_in_pixels(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(mini_bundle, "--resolution", "65x64", "--recordings", tmp_path / "recordings") == 2
    assert "--resolution 65x64: both sides must be multiples of 8 pixels" in capsys.readouterr().err
