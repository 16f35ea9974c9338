"""Which files of a directory of recordings are the recordings'."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cat_pruning.errors import OutputError
from cat_pruning.tuning.recorder import RecordedRun, existing_run, forget, record

RUN = RecordedRun(
    bundle="0" * 64,
    engine="torch",
    scheduler={"class": "Euler"},
    steps=8,
    prompts=("a", "b", "c"),
    batch=2,
    seed=0,
    height=64,
    width=64,
    guidance_scale=3.0,
)
FILES = ("run.json", "batch-0000.safetensors", "batch-0001.safetensors", "tune.json", "tune.png")


def write(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).write_text(json.dumps(RUN.to_dict()) if name == "run.json" else "")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_run_is_read_back_and_forgotten(tmp_path: Path) -> None:
    assert existing_run(tmp_path / "nowhere") is None
    write(tmp_path, *FILES, "notes.txt")
    assert existing_run(tmp_path) == RUN
    forget(tmp_path)
    assert names(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("name", ["batch-0000.safetensors", "batch-mine.safetensors", "tune.json", "tune.png"])
@pytest.mark.parametrize("record", [None, "{}", "[" * 9999, json.dumps(RUN.to_dict() | {"batch": 0}), '"\\ud800"'])
def test_files_of_others_are_named_and_kept(tmp_path: Path, name: str, record: str | None) -> None:
    write(tmp_path, name)
    if record is not None:
        (tmp_path / "run.json").write_text(record)
    before = names(tmp_path)
    for read in (existing_run, forget):
        with pytest.raises(OutputError, match=rf"has .*{name}.*, not listed by the run.json of recordings: .*--record"):
            read(tmp_path)
    assert names(tmp_path) == before


def test_another_batch_than_the_runs_is_kept(tmp_path: Path) -> None:
    write(tmp_path, *FILES, "batch-0002.safetensors")
    assert existing_run(tmp_path) == RUN
    with pytest.raises(OutputError, match=r"has batch-0002\.safetensors, not listed"):
        forget(tmp_path)
    assert names(tmp_path) == sorted([*FILES, "batch-0002.safetensors"])
    assert dataclasses.replace(RUN, batch=1).files() == {*FILES, "batch-0002.safetensors"}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_in_a_batchs_place_is_told(tmp_path: Path, make: Any) -> None:
    """A pipe would be waited for without end."""
    write(tmp_path, "run.json")
    make(tmp_path / "batch-0000.safetensors")
    pool: Any = None  # nothing is recorded
    with pytest.raises(OutputError, match=r"batch-0000\.safetensors is no file; move it away, or give another --rec"):
        record(pool, RUN, tmp_path, lambda count: None)
