"""The versions that a record names: of this package, and of what is installed beside it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

import cat_pruning

UNKNOWN = "unknown"


def version_of(distribution: str) -> str:
    """The version of a distribution; ours is the package's own, which a checkout without an installation has too."""
    if distribution == "cat-pruning":
        return cat_pruning.__version__
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # onnxruntime, say, where it is onnxruntime-gpu
        return UNKNOWN


def versions_of(distributions: Iterable[str]) -> dict[str, str]:
    """The version of each, by name."""
    return {name: version_of(name) for name in distributions}
