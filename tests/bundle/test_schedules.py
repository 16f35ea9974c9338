"""The schedules in a bundle."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from cat_pruning.bundle import changes
from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.manifest import MANIFEST_NAME
from cat_pruning.bundle.schedules import choose_schedule, read_schedules, write_schedules
from cat_pruning.errors import BundleError, OutputError, ScheduleError
from cat_pruning.files import write_whole
from cat_pruning.schedule import MadeFor, Measured, Schedule, config_sha256

CLASS, CONFIG = "SD3Transformer2DModel", {"num_layers": 2}  # of the fixture's manifest


def make(steps: int, full: int, speedup: float | None = None, weight: float = 1.0, **made_for: Any) -> Schedule:
    fields: dict[str, Any] = {
        "transformer_class": CLASS,
        "config_sha256": config_sha256(CONFIG),
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "guidance_scale": 3.0,
        "height": 256,
        "width": 256,
        "prompts": 24,
    }
    measured = speedup and Measured(speedup=speedup, predicted_error=0.1, error=0.1, half_width=None, prompts=1)
    weights = {step: {full - 1: weight} for step in range(full, steps)}
    return Schedule.of(steps, range(full), weights, made_for=MadeFor(**fields | made_for), measured=measured or None)


def test_written_they_are_read(bundle: Bundle) -> None:
    made = [make(28, 9), make(28, 14), make(50, 16)]
    written = write_schedules(bundle.path, made)
    assert written == Bundle.open(bundle.path)
    assert read_schedules(written) == {"28-14": made[1], "28-9": made[0], "50-16": made[2]}
    assert [*read_schedules(written)] == ["28-14", "28-9", "50-16"]  # the slowest first
    assert all(name in written.manifest.files for name in written.manifest.schedules)


def test_one_takes_the_place_of_its_name_and_leaves_the_others(bundle: Bundle) -> None:
    write_schedules(bundle.path, [make(28, 9), make(28, 14)])
    written = write_schedules(bundle.path, [make(28, 9, weight=2.0)])
    assert read_schedules(written) == {"28-14": make(28, 14), "28-9": make(28, 9, weight=2.0)}
    assert len([*(bundle.path / "schedules").iterdir()]) == 2  # nothing is left of the one before
    assert len([name for name in written.manifest.files if name.startswith("schedules/")]) == 2


def test_the_digest_is_of_the_rest(bundle: Bundle) -> None:
    written = write_schedules(bundle.path, [make(28, 9)])
    assert written.manifest.digest == bundle.manifest.digest
    other = bundle.manifest.model_copy(update={"guidance": False})
    assert other.digest != bundle.manifest.digest


@pytest.mark.parametrize("fails_at", range(4))
def test_a_write_that_fails_leaves_the_bundle_as_it_was(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Their names, two files and the manifest are written, in this order."""
    before = write_schedules(bundle.path, [make(28, 9)])
    writes = 0

    def write(path: Path, content: str | bytes) -> None:
        nonlocal writes
        writes += 1
        if writes > fails_at:
            raise OSError(28, "No space left on device")
        write_whole(path, content)

    monkeypatch.setattr(changes, "write_whole", write)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left"):
        write_schedules(bundle.path, [make(28, 9, weight=2.0), make(28, 7)])
    assert Bundle.open(bundle.path) == before
    assert read_schedules(before) == {"28-9": make(28, 9)}


def test_an_edited_or_missing_file_is_refused(bundle: Bundle) -> None:
    written = write_schedules(bundle.path, [make(28, 9)])
    path = bundle.path / written.manifest.schedules[0]
    path.write_text(path.read_text().replace("1.0", "1.1"))
    with pytest.raises(BundleError, match="was changed after the export"):
        read_schedules(Bundle.open(bundle.path))
    path.unlink()
    with pytest.raises(BundleError, match="is missing"):
        Bundle.open(bundle.path)


def test_a_manifest_that_lists_what_is_no_file_is_refused(bundle: Bundle) -> None:
    fields = json.loads((bundle.path / MANIFEST_NAME).read_text())
    (bundle.path / MANIFEST_NAME).write_text(json.dumps(fields | {"schedules": ["schedules/28-9.0.json"]}))
    with pytest.raises(BundleError, match="schedules that are not among the files"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("made_for", "reason"),
    [
        ({"transformer_class": "FluxTransformer2DModel"}, f"for a FluxTransformer2DModel, this is a {CLASS}"),
        ({"config_sha256": "0" * 64}, f"for a {CLASS} whose config has the hash 000000000000, this one's has "),
    ],
)
def test_another_model_s_is_refused(bundle: Bundle, made_for: dict[str, str], reason: str) -> None:
    written = write_schedules(bundle.path, [make(28, 9, **made_for)])
    with pytest.raises(ScheduleError, match=reason):
        read_schedules(written)


@pytest.mark.parametrize(
    ("speedup", "steps", "expected"),
    [(2, 28, "28-14"), (3.1, 28, "28-9"), (3, 28, "28-9"), (1, 28, "28-14"), (3, 50, "50-16")],
)
def test_the_slowest_that_is_fast_enough_is_chosen(speedup: float, steps: int, expected: str) -> None:
    made = [make(28, 14, 2.0), make(28, 9, 3.09), make(28, 7, 4.0), make(50, 16, 3.1)]
    chosen = choose_schedule({each.name: each for each in made}, speedup, steps, tune="cat-tune b")
    assert chosen.name == expected


def test_what_there_is_is_named() -> None:
    made = {"28-14": make(28, 14, 2.0), "50-16": make(50, 16, 3.1)}
    with pytest.raises(ScheduleError) as caught:
        choose_schedule(made, 3.0, 28, tune="cat-tune b")
    assert "no schedule of 28 steps that is 3 times as fast; there are 28 steps at 2, 50 steps at 3.1" in str(
        caught.value
    )
    assert caught.value.remedy == "make one: cat-tune b --steps 28 --speedup 3"
    with pytest.raises(ScheduleError, match="nor any other"):
        choose_schedule({}, 3.0, 28, tune="cat-tune b")


def test_files_that_it_never_listed_stay(bundle: Bundle) -> None:
    write_schedules(bundle.path, [make(28, 9)])
    own = bundle.path / "schedules/my-own.json"
    own.write_text("{}")
    (bundle.path / "schedules/folder.json").mkdir()
    write_schedules(bundle.path, [make(28, 9, weight=2.0)])
    assert own.read_text() == "{}"
    assert len([*(bundle.path / "schedules").iterdir()]) == 3


def test_schedules_of_another_export_are_refused(bundle: Bundle) -> None:
    digest = bundle.manifest.digest
    other = bundle.manifest.model_copy(update={"settings": bundle.manifest.settings.replace(full_steps=5)})
    write_whole(bundle.path / MANIFEST_NAME, other.model_dump_json())
    with pytest.raises(OutputError, match=r"was replaced by another export meanwhile.*; tune it again"):
        write_schedules(bundle.path, [make(28, 9)], digest=digest)
    assert Bundle.open(bundle.path).manifest == other


def _tuned(path: Path, full: int, barrier: Any) -> None:
    barrier.wait()
    for weight in (1.0, 2.0, 3.0):
        write_schedules(path, [make(28, full, weight=weight)])


def test_several_processes_that_tune_one_bundle(bundle: Bundle) -> None:
    """One lost its schedules, or the bundle listed files that the other had deleted."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    tuning = [context.Process(target=_tuned, args=(bundle.path, full, barrier)) for full in (9, 12, 14, 16)]
    for process in tuning:
        process.start()
    while any(process.is_alive() for process in tuning):
        read_schedules(Bundle.open(bundle.path))  # whole at every moment
    assert [process.exitcode for process in tuning] == [0] * 4
    schedules = read_schedules(Bundle.open(bundle.path))
    assert schedules == {f"28-{full}": make(28, full, weight=3.0) for full in (16, 14, 12, 9)}
