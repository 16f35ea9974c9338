"""A bundle changed in its place: schedules and plans added and dropped, where readers see the old one or the new one.

The manifest is replaced in one step. Files that it comes to list are put there before, under names that it does not
list yet, and files that it lists no longer go after that. Which these are is written first, to `.changing.json`. So
whatever a process dies of, the bundle is whole, and the next change clears away what was left.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.manifest import CHANGING_NAME, MANIFEST_NAME, Manifest, parse_manifest, read_manifest
from cat_pruning.bundle.outside import changing_files
from cat_pruning.bundle.schema import FileSpec
from cat_pruning.bundle.signatures import SIGNATURE_NAME, read_private_key, write_signature
from cat_pruning.errors import BundleError, OutputError
from cat_pruning.files import read_bytes, replacing, sha256, write_whole

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a bundle becomes.

    Attributes:
        fields: of the manifest, with their new values.
        added: files by their names in the bundle, none of them listed before: what they contain, or where they are,
            whole, to be moved.
        dropped: names of files that are no longer listed.
    """

    fields: Mapping[str, Any]
    added: Mapping[str, bytes | Path] = field(default_factory=dict)
    dropped: Collection[str] = ()


def change_bundle(directory: Path, change: Callable[[Manifest], Change]) -> Bundle:
    """Change a bundle in its place, wholly or not at all. Waits for another process that does.

    Args:
        directory: the bundle's.
        change: from the manifest as it is when nobody else changes it; may raise, and then nothing is changed.

    Raises:
        BundleError: there is no bundle.
        OutputError: it cannot be written; it is as it was.
    """
    bundle = Bundle.open(directory)
    try:
        with alone(bundle.path):
            manifest = read_manifest(bundle.path)  # once more: another process may have changed it meanwhile
            _clear(bundle.path, manifest)
            wanted = change(manifest)
            _check_free(bundle.path, wanted)
            dropped = set(wanted.dropped) - set(wanted.added)
            journal = json.dumps(sorted({*dropped, *wanted.added}))
            write_whole(bundle.path / CHANGING_NAME, journal)
            try:
                files = {name: spec for name, spec in manifest.files.items() if name not in dropped}
                files |= {name: _put(bundle.path / name, content) for name, content in wanted.added.items()}
                changed = manifest.model_copy(update=dict(wanted.fields)).with_files(files)
                if changed != manifest:
                    write_whole(bundle.path / MANIFEST_NAME, changed.model_dump_json(indent=2) + "\n")
            except BaseException:
                with suppress(OSError, BundleError):
                    _clear(bundle.path, read_manifest(bundle.path))  # an interruption may come after it was replaced
                raise
            if changed != manifest:
                _unsign(bundle.path)
            _clear(bundle.path, changed)
    except OSError as error:
        raise OutputError(
            f"{bundle.path} cannot be written ({error.strerror or error})", "make room, or make it writable"
        ) from error
    return Bundle(path=bundle.path, manifest=changed)


def sign_bundle(bundle: Bundle, key_file: Path) -> None:
    """Sign a bundle, whose files are not looked at: verify them before.

    Args:
        bundle: as it was verified.
        key_file: see `read_private_key`.

    Raises:
        BundleError: it was changed since it was opened.
        InstallationError, SettingsError: as `read_private_key`.
        OutputError: the signature cannot be written.
    """
    key = read_private_key(key_file)
    try:
        with alone(bundle.path):
            content = read_bytes(bundle.path / MANIFEST_NAME)
            if parse_manifest(content, MANIFEST_NAME, bundle.path) != bundle.manifest:
                raise BundleError(f"{bundle.path} was changed while it was verified", "sign it again")
            write_signature(bundle.path, content, key)
    except OSError as error:
        raise OutputError(
            f"{bundle.path} cannot be written ({error.strerror or error})", "make room, or make it writable"
        ) from error


def _unsign(directory: Path) -> None:
    """Take off a signature, which was of the manifest before."""
    if (signature := directory / SIGNATURE_NAME).exists():
        signature.unlink()
        _log.warning("%s was changed and is no longer signed: cat-bundle sign %s --key FILE", directory, directory)


def _check_free(directory: Path, change: Change) -> None:
    """Check that nothing lies where files are to be moved: what the manifest does not list is somebody's."""
    moved = [name for name, content in change.added.items() if isinstance(content, Path)]
    if there := [name for name in moved if os.path.lexists(directory / name)]:
        raise OutputError(f"{directory} has {there[0]}, not listed by its {MANIFEST_NAME}", "move that away")


def _put(path: Path, content: bytes | Path) -> FileSpec:
    """Put a file into the bundle, on the disk before the manifest lists it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        write_whole(path, content)
        return FileSpec(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    spec = FileSpec(size=content.stat().st_size, sha256=sha256(content))
    try:
        content.replace(path)
    except OSError as error:
        if error.errno != errno.EXDEV:  # the bundle is a disk of its own
            raise
        with replacing(path) as part:
            shutil.copyfile(content, part)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return spec


def _clear(directory: Path, manifest: Manifest) -> None:
    """Delete the files that a change was to add or to drop and that the manifest does not list."""
    left = [name for name in changing_files(directory) if name not in manifest.files]
    for name in left:
        (directory / name).unlink(missing_ok=True)
    for folder in _folders(left):
        with suppress(OSError):  # it holds something else
            (directory / folder).rmdir()
    (directory / CHANGING_NAME).unlink(missing_ok=True)


def _folders(names: Iterable[str]) -> list[Path]:
    """The folders of files, inner ones first."""
    folders = {parent for name in names for parent in Path(name).parents if parent.name}
    return sorted(folders, key=lambda folder: -len(folder.parts))


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep others that change a bundle out of it meanwhile, by a lock of the directory itself."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # the system lets go of it when the process ends, however it ends
        yield
    finally:
        os.close(descriptor)
