from __future__ import annotations

import importlib.metadata

import pytest

import cat_pruning
from cat_pruning.versions import version_of, versions_of


def test_versions_of_what_is_installed() -> None:
    assert versions_of(["torch", "nobody-has-this"]) == {
        "torch": importlib.metadata.version("torch"),
        "nobody-has-this": "unknown",
    }


def test_a_checkout_without_an_installation_knows_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert version_of("cat-pruning") == cat_pruning.__version__
    assert version_of("torch") == "unknown"
