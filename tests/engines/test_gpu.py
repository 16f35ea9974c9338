from __future__ import annotations

import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from cat_pruning.engines import gpu
from cat_pruning.engines.gpu import gpu_architecture, missing_gpu

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver"


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "sm90"), ((8, 6), "sm86"), ((12, 1), "sm121")])
def test_the_architecture_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability if device == 1 else (0, 0))
    assert gpu_architecture(1) == expected


def test_no_gpu_and_a_driver_that_torch_warns_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn(TOO_OLD, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert gpu_architecture() is None


@pytest.mark.parametrize("error", [RuntimeError(TOO_OLD), AssertionError(TOO_OLD)])
def test_why_there_is_none(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "init", init)
    assert missing_gpu() == " ".join(TOO_OLD.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_why_there_is_none_here() -> None:
    assert gpu_architecture() is None
    assert missing_gpu()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_describing_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_CUDA", "no-such-library")
    monkeypatch.setattr(gpu, "_MANAGEMENT", "no-such-library")
    known = {"torch_cuda_version": torch.version.cuda}
    absent = ("name", "memory_bytes", "architecture", "driver_version", "driver_cuda_version")
    assert gpu.describe_gpu() == dict.fromkeys(absent) | known


DRIVER = """
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { return size < 10 || !strcpy(text, "580.65.06"); }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, to stand in for a driver")
def test_a_driver_says_its_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "driver.c").write_text(f"#include <string.h>{DRIVER}")
    library = str(tmp_path / "driver.so")
    subprocess.run(["gcc", "-shared", "-fPIC", str(tmp_path / "driver.c"), "-o", library], check=True)
    monkeypatch.setattr(gpu, "_CUDA", library)
    monkeypatch.setattr(gpu, "_MANAGEMENT", library)
    assert (gpu.driver_version(), gpu.driver_cuda_version()) == ("580.65.06", "12.8")


def test_a_library_that_is_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "driver.so").write_bytes(b"")
    monkeypatch.setattr(gpu, "_CUDA", str(tmp_path / "driver.so"))
    monkeypatch.setattr(gpu, "_MANAGEMENT", str(tmp_path / "driver.so"))
    assert (gpu.driver_version(), gpu.driver_cuda_version()) == (None, None)
