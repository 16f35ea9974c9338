"""What every evaluation asks of a bundle is counted once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cat_pruning.bundle.schema import MacsSpec, ProfileSpec
from cat_pruning.exporter.export import profile_macs


@pytest.fixture(scope="session", autouse=True)
def _counted_once() -> Iterator[None]:
    """The MACs of a bundle's graphs at a profile."""
    counted: dict[str, MacsSpec] = {}

    def count(directory: Path, graphs: Any, profile: ProfileSpec, *patch_size: int) -> MacsSpec:
        key = f"{directory} {profile}"
        if key not in counted:
            counted[key] = profile_macs(directory, graphs, profile, *patch_size)
        return counted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cat_pruning.evaluation.sweep.profile_macs", count)
        yield
