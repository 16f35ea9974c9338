from __future__ import annotations

import warnings

import pytest
import torch

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
