from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from cat_pruning.bundle.schema import PlanSpec
from cat_pruning.engines.plan_caches import read_cache, runtime_cache_path, timing_cache_path, write_cache
from cat_pruning.step_io import Part

PLAN = PlanSpec(
    part=Part.STEP,
    flavour="tensorrt",
    version="11.4.0.106",
    architectures=("sm90",),
    token_ops="plugin",
    file="step.plan",
)
RTX = PLAN.model_copy(
    update={"flavour": "tensorrt_rtx", "version": "1.7.1", "architectures": ("sm80", "sm120"), "token_ops": "function"}
)


def test_caches_lie_beside_the_bundle_and_carry_flavour_version_and_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cat_pruning.engines.plan_caches.gpu_file_name", lambda: None)
    folder = tmp_path / "sd3.cache"
    assert timing_cache_path(tmp_path / "sd3", PLAN) == folder / "tensorrt-11.4.0.106-sm90.timing"
    assert runtime_cache_path(tmp_path / "sd3", RTX) == folder / "tensorrt_rtx-1.7.1-sm80-sm120-step.runtime"
    monkeypatch.setattr("cat_pruning.engines.plan_caches.gpu_file_name", lambda: "sm86-nvidia-a10")
    assert runtime_cache_path(tmp_path / "sd3", RTX) == folder / "tensorrt_rtx-1.7.1-sm86-nvidia-a10-step.runtime"


def test_a_bundle_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sd3").mkdir()
    monkeypatch.chdir(tmp_path / "sd3")
    assert timing_cache_path(Path(), PLAN).parent == tmp_path / "sd3.cache"


@pytest.mark.parametrize("data", [b"", b"timings", bytes(1 << 20)])
def test_what_is_written_is_read(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "sd3.cache" / "cache"
    assert read_cache(path) is None
    write_cache(path, b"older")
    write_cache(path, data)
    assert read_cache(path) == data
    assert list(path.parent.iterdir()) == [path]
    assert caplog.records == []


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "foreign"])
def test_a_damaged_cache_is_ignored(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache"
    write_cache(path, b"timings of kernels")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(
        {"empty": b"", "truncated": path.read_bytes()[:40], "flipped": bytes(content), "foreign": b"x" * 99}[damage]
    )
    assert read_cache(path) is None
    assert [record.getMessage() for record in caplog.records] == [f"{path} is damaged and is ignored"]


def test_a_directory_in_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache" / "x").mkdir(parents=True)
    assert read_cache(tmp_path / "cache") is None
    write_cache(tmp_path / "cache", b"timings")
    assert ["cannot be read" in caplog.messages[0], "cannot be written" in caplog.messages[1]] == [True, True]
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


def test_a_folder_that_cannot_be_made_or_written_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sd3.cache").write_text("a file")
    write_cache(tmp_path / "sd3.cache" / "cache", b"timings")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "cannot be written" in caplog.messages[0]

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr("cat_pruning.engines.plan_caches.write_whole", read_only)
    write_cache(tmp_path / "cache", b"timings")
    assert "(Read-only file system)" in caplog.messages[1]
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_write_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    write_cache(path, b"older")

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", fail)
    write_cache(path, b"newer")
    assert read_cache(path) == b"older"
    assert list(tmp_path.iterdir()) == [path]
