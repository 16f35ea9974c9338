"""Which files of a directory are ours: only what a record of ours lists is ever deleted or written over.

A record is the JSON file that a tool writes first and removes last: a bundle's manifest.json, the run.json of an
evaluation or of recordings. What lies in a tool's places and is not listed there is somebody's, and is named.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from cat_pruning.errors import OutputError

_PART = re.compile(r"\.(.+)\.\d+-\d+\.part")  # what `files.replacing` writes to, left behind by a process that died
_NAMED = 3  # how many files an error names


def foreign_files(directory: Path, listed: Collection[str], places: Collection[str] = ("*",)) -> list[str]:
    """The files that lie in a tool's places and that its record does not list.

    Args:
        directory: which need not exist.
        listed: names of files, relative to the directory, with `/`.
        places: names in the directory, or patterns of them as `fnmatch` has them, that the tool writes to; of a folder
            all that is below it.

    Raises:
        OSError: the directory cannot be read.
    """
    return sorted(name for name in _files(directory, places) if _whole(name) not in listed)


def check_ours(
    directory: Path,
    listed: Collection[str],
    places: Collection[str],
    record: str,
    remedy: str,
    among: Collection[str] | None = None,
) -> None:
    """Check that all files in a tool's places are listed.

    Args:
        directory: as `foreign_files` takes it.
        listed: likewise.
        places: likewise.
        record: what would have to list them, for the error.
        remedy: of the error, besides moving the files away.
        among: look at these files only.

    Raises:
        OutputError: some are not listed; it names them.
    """
    try:
        foreign = foreign_files(directory, listed, places)
    except OSError as error:
        raise OutputError(f"{directory} cannot be read ({error.strerror or error})", remedy) from error
    if among is not None:
        foreign = [name for name in foreign if name in among]
    if foreign:
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        raise OutputError(
            f"{directory} has {', '.join(foreign[:_NAMED])}{more}, not listed by {record}: only what is listed is "
            "deleted or written over",
            f"move that away, or {remedy}",
        )


def check_files(directory: Path, names: Collection[str], remedy: str) -> None:
    """Check that what is there of a tool's files are files, which can be read and replaced: no folder, pipe or device.

    Args:
        directory: which need not exist.
        names: of the files, relative to the directory, with `/`.
        remedy: of the error, besides moving it away.

    Raises:
        OutputError: one is something else.
    """
    for name in sorted(names):
        path = directory / name
        if os.path.lexists(path) and not path.is_file():
            raise OutputError(f"{path} is no file", f"move it away, or {remedy}")


def remove_ours(directory: Path, listed: Collection[str], places: Collection[str], record: str) -> None:
    """Delete what is listed, the record last, and the folders that become empty by it.

    Args:
        directory: as `foreign_files` takes it.
        listed: likewise.
        places: likewise.
        record: the name of the file that lists the others.

    Raises:
        OSError: a file cannot be deleted. What is left is listed still.
    """
    names = [name for name in _files(directory, places) if _whole(name) in listed and name != record]
    for name in names:
        (directory / name).unlink(missing_ok=True)
    folders = {parent for name in names for parent in Path(name).parents if parent.name}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with contextlib.suppress(OSError):  # it holds something else
            (directory / folder).rmdir()
    (directory / record).unlink(missing_ok=True)


def _files(directory: Path, places: Collection[str]) -> Iterator[str]:
    """All but real folders; a link to a folder is a file here."""
    if not directory.is_dir():
        return
    for entry in os.scandir(directory):
        if not any(fnmatch.fnmatchcase(_whole(entry.name), place) for place in places):
            continue
        if not entry.is_dir(follow_symlinks=False):
            yield entry.name
            continue
        for folder, folders, files in os.walk(entry.path):
            below = Path(folder).relative_to(directory)
            links = [name for name in folders if (Path(folder) / name).is_symlink()]
            yield from ((below / name).as_posix() for name in (*files, *links))


def _whole(name: str) -> str:
    """The name that a file would have got, had it been written to its end."""
    folder, slash, last = name.rpartition("/")
    part = _PART.fullmatch(last)
    return f"{folder}{slash}{part[1]}" if part else name
