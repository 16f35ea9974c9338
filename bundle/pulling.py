"""A bundle from elsewhere: hashed while it comes in, and here whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

from cat_pruning.bundle.bundle import Bundle, is_disk_full, new_bundle
from cat_pruning.bundle.changes import alone
from cat_pruning.bundle.manifest import MANIFEST_NAME, Manifest, parse_manifest
from cat_pruning.bundle.places import Place
from cat_pruning.bundle.schema import FileSpec
from cat_pruning.bundle.signatures import SIGNATURE_NAME, PublicKey
from cat_pruning.errors import BundleError, OutputError
from cat_pruning.files import read_bytes

_CHUNK_BYTES: Final = 1 << 22
_UNUSUAL: Final = re.compile(r"[^\w.@=-]")  # in a directory's name
_LONGEST_NAME: Final = 80  # characters of a URL's last part in a folder's name
Told = Callable[[str], object]  # the name of the file that comes next


def _silent(name: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A bundle in a place: its manifest, as bytes too, and its signature, if it has one."""

    place: Place
    content: bytes
    signature: bytes | None
    manifest: Manifest

    @classmethod
    def of(cls, url: str, public_key: PublicKey | None = None) -> Self:
        """Read the manifest of a bundle at a URL; the key is asked for before anything else of it is read.

        Raises:
            BundleError, InstallationError, SettingsError: as `pull`.
        """
        return cls.of_place(Place.of(url), public_key)

    @classmethod
    def of_place(cls, place: Place, public_key: PublicKey | None) -> Self:
        """Likewise, of a place.

        Raises:
            BundleError: likewise.
        """
        if (content := place.read(MANIFEST_NAME)) is None or not content:
            raise BundleError(f"{place.url} has no {MANIFEST_NAME}: no bundle", "push one: cat-bundle push BUNDLE URL")
        signature = place.read(SIGNATURE_NAME)
        if public_key is not None:
            public_key.check(place.url, content, signature)
        try:
            manifest = parse_manifest(content, f"{place.url}/{MANIFEST_NAME}", Path(place.url))
        except BundleError as error:
            raise BundleError(error.problem, "push it again, by the cat-pruning that is to load it") from error
        return cls(place=place, content=content, signature=signature, manifest=manifest)


def pull(
    url: str,
    out: Path,
    *,
    force: bool = False,
    public_key: PublicKey | None = None,
    told: Told = _silent,
) -> Bundle:
    """Copy a bundle from a place to this machine.

    Args:
        url: see `Place.of`.
        out: the bundle's directory here.
        force: replace a bundle that is there.
        public_key: what it must be signed with, which is checked before anything else of it is read.
        told: called before every file, to show progress.

    Raises:
        BundleError: there is no bundle, it cannot be read, it is truncated or not what was pushed, or not signed.
        InstallationError, SettingsError: as `Place.of`.
        OutputError: as `new_bundle`.
    """
    return _pulled(Source.of(url, public_key), out, force, told)


def local_copy(url: str, public_key: PublicKey | None = None) -> Path:
    """The directory of a copy of a bundle that is elsewhere, pulled unless it is here already.

    Copies lie in `CAT_PRUNING_CACHE`, or in `cat-pruning` among the user's caches, one for each state of the bundle.
    What a copy of another state has of the same files is linked and not pulled again. Nothing is ever deleted there.
    A URL of this machine's files is their directory.

    Raises:
        BundleError, InstallationError, OutputError, SettingsError: as `pull`.
    """
    source = Source.of(url, public_key)
    if source.place.directory is not None:
        return source.place.directory
    name = _UNUSUAL.sub("_", url.rstrip("/").rpartition("/")[2]).lstrip(".")[:_LONGEST_NAME] or "bundle"
    folder = cache_folder() / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):  # another process may pull the same
            state = hashlib.sha256(source.content + (source.signature or b"")).hexdigest()[:16]
            copy = folder / state / name  # a directory's name is the bundle's, in a server too
            if not _is_copy(copy, source):
                _pulled(source, copy, True, _silent, others=_bundles(folder))
            return copy
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror or error})", "set CAT_PRUNING_CACHE to a folder of yours"
        ) from error


def copy_bundle(bundle: Bundle, out: Path, *, force: bool = False, told: Told = _silent) -> Bundle:
    """Copy a bundle of this machine to another directory of it, as `pull` does.

    Raises:
        BundleError: it was edited.
        OutputError: as `new_bundle`.
    """
    return _pulled(Source.of_place(Place.local(bundle.path), None), out, force, told)


def cache_folder() -> Path:
    """Where copies of bundles lie that were loaded by a URL."""
    if given := os.environ.get("CAT_PRUNING_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cat-pruning"


def _pulled(source: Source, out: Path, force: bool, told: Told, others: Sequence[Bundle] = ()) -> Bundle:
    """The bundle of a source, here; what other bundles here have of the same files is linked."""
    manifest = source.manifest
    needed = sum(spec.size for spec in manifest.files.values())
    with new_bundle(out, force=force, needed_bytes=needed) as writer:
        for name, spec in manifest.files.items():
            told(name)
            try:
                target = writer.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not any(_linked(other, name, spec, target) for other in others):
                    _copy(source.place, name, spec, target)
            except OSError as error:
                if is_disk_full(error):
                    raise
                problem = f"{out}: {name} cannot be written ({error.strerror or error})"
                raise OutputError(problem, "give another directory") from error
        if source.signature is not None:
            (writer.path / SIGNATURE_NAME).write_bytes(source.signature)
        return writer.place(source.content, manifest)


def _copy(place: Place, name: str, spec: FileSpec, target: Path) -> None:
    """Copy a file, and hash it meanwhile."""
    again = "push it again, or pull it again if it was being pushed"
    with place.opened(name) as source:
        if source is None:
            raise BundleError(f"{place.url}: {name} is missing, expected {spec.size} bytes", again)
        with target.open("xb") as file:
            size, sha256 = _streamed(place, source, file, spec.size)
    if size != spec.size:
        has = f"more than {spec.size}" if size > spec.size else str(size)
        raise BundleError(f"{place.url}: {name} has {has} bytes, expected {spec.size}: truncated or edited", again)
    if sha256 != spec.sha256:
        raise BundleError(f"{place.url}: {name} has the SHA-256 {sha256}, expected {spec.sha256}: edited", again)


def _streamed(place: Place, source: BinaryIO, target: BinaryIO, most: int) -> tuple[int, str]:
    """The size and the SHA-256 of what was copied; it stops where there is more than there should be."""
    digest, size = hashlib.sha256(), 0
    while size <= most and (chunk := place.next_bytes(source, _CHUNK_BYTES)):
        digest.update(chunk)
        target.write(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def _linked(other: Bundle, name: str, spec: FileSpec, target: Path) -> bool:
    """Link a file of another bundle, if it has the same."""
    if other.manifest.files.get(name) != spec:
        return False
    try:
        target.hardlink_to(other.verified(name))
    except (BundleError, OSError):  # it was edited, or this file system has no links
        target.unlink(missing_ok=True)
        return False
    return True


def _is_copy(copy: Path, source: Source) -> bool:
    """Whether a directory has this state of a bundle; its files are hashed when they are used."""
    try:
        bundle = Bundle.open(copy)
        return read_bytes(bundle.path / MANIFEST_NAME) == source.content
    except (BundleError, OSError):
        return False


def _bundles(folder: Path) -> list[Bundle]:
    """The whole bundles in a folder."""
    found = []
    for path in folder.glob("*/*"):
        with suppress(BundleError):
            found.append(Bundle.open(path))
    return found
