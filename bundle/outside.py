"""Nothing is written into a bundle, the one at hand or another, but by the tools that make it and tune it.

It would not load again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pydantic

from cat_pruning.bundle.manifest import CHANGING_NAME, MANIFEST_NAME
from cat_pruning.bundle.schema import BundlePath
from cat_pruning.bundle.signatures import SIGNATURE_NAME
from cat_pruning.errors import SettingsError
from cat_pruning.files import read_json, read_text

_SCHEDULE: Final = re.compile(r"\d+-\d+\.[0-9a-f]{12}\.json")  # as `write_schedules` names them


def listed_files(directory: Path) -> set[str]:
    """The files of the bundle in a directory: its manifest, what that lists, what a change was adding or dropping, and
    schedules that it no longer lists.

    Manifests of other format versions list their files in the same way. Of what is no bundle nothing is listed.
    """
    try:
        fields = read_json(directory / MANIFEST_NAME)
    except (OSError, ValueError):
        return set()
    files = fields.get("files") if isinstance(fields, dict) and "format_version" in fields else None
    if not isinstance(files, dict):
        return set()
    there = (path.name for path in (directory / "schedules").glob("*"))
    schedules = (f"schedules/{name}" for name in there if _SCHEDULE.fullmatch(name))
    return {MANIFEST_NAME, SIGNATURE_NAME, CHANGING_NAME, *files, *changing_files(directory), *schedules}


def changing_files(directory: Path) -> list[str]:
    """The files that a change in place was adding or dropping when its process died; see `change_bundle`."""
    try:
        return pydantic.TypeAdapter(list[BundlePath]).validate_json(read_text(directory / CHANGING_NAME))
    except (OSError, ValueError):
        return []


def check_outside(outputs: Iterable[tuple[str, Path]]) -> None:
    """Check that files go neither over the files of any bundle nor into its folders.

    Args:
        outputs: the files, each with the option that names it.

    Raises:
        SettingsError: an output is there.
    """
    for option, file in outputs:
        place = Path(os.path.realpath(file))
        for around in place.parents:
            own = {name.split("/")[0] for name in listed_files(around)}
            if place.relative_to(around).parts[0] in own:
                raise SettingsError(
                    f"{option} {file} would be among the own files of the bundle {around}", "give another path"
                )


def check_directory_outside(option: str, directory: Path) -> None:
    """Check that a directory of results is neither a bundle's nor in one.

    Raises:
        SettingsError: it is.
    """
    place = Path(os.path.realpath(directory))
    if around := next((each for each in (place, *place.parents) if listed_files(each)), None):
        raise SettingsError(
            f"{option} {directory} would be among the own files of the bundle {around}", "give another directory"
        )
