"""Nothing is written into a bundle but by the tools that make it and tune it: it would not load again."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cat_pruning.errors import SettingsError

if TYPE_CHECKING:
    from cat_pruning.bundle.bundle import Bundle


def check_outside(bundle: Bundle, outputs: Iterable[tuple[str, Path]]) -> None:
    """Check that files go neither over a bundle's files nor into its folders.

    Args:
        bundle: which is to stay as it is.
        outputs: the files, each with the option that names it.

    Raises:
        SettingsError: an output is there.
    """
    own = {"manifest.json", *(name.split("/")[0] for name in bundle.manifest.files)}
    for option, file in outputs:
        place = Path(os.path.realpath(file))
        if place.is_relative_to(bundle.path) and (place.relative_to(bundle.path).parts or ("",))[0] in own:
            raise SettingsError(f"{option} {file} would be among the bundle's own files", "give another path")


def check_directory_outside(bundle: Bundle, option: str, directory: Path) -> None:
    """Check that a directory of results is neither a bundle's nor in it.

    Raises:
        SettingsError: it is.
    """
    if Path(os.path.realpath(directory)).is_relative_to(bundle.path):
        raise SettingsError(f"{option} {directory} would be among the bundle's own files", "give another directory")
