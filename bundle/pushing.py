"""A bundle copied to a storage, whose manifest comes last: until then it is none, or the one that was there before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.manifest import MANIFEST_NAME, Manifest, parse_manifest
from cat_pruning.bundle.places import Place
from cat_pruning.bundle.pulling import Told, copy_bundle
from cat_pruning.bundle.signatures import SIGNATURE_NAME, read_signature
from cat_pruning.errors import BundleError, OutputError, SettingsError
from cat_pruning.files import read_bytes

_HUB: Final = re.compile(r"(?:models/)?([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")  # owner/name@revision/folder


def push(bundle: Bundle, url: str, *, force: bool = False, told: Told = lambda name: None) -> None:
    """Copy a bundle of this machine to a place; every file is hashed before.

    To the hub it is one commit. To other storages the manifest is written last. Files that are there already as they
    should be, of a bundle that this one replaces, are not sent again. If a push fails, what was there is as it was,
    unless files of it had to be written over: then nothing there is a bundle until one is pushed.

    Args:
        bundle: what to push.
        url: see `Place.of`.
        force: replace another bundle that is there; other files there always stay.
        told: called before every file, to show progress.

    Raises:
        BundleError: a file of the bundle was changed, or the place cannot be read.
        InstallationError, SettingsError: as `Place.of`.
        OutputError: another bundle is there, or the place cannot be written.
    """
    place = Place.of(url)
    if place.directory is not None:
        copy_bundle(bundle, place.directory, force=force, told=told)
        return
    content = read_bytes(bundle.path / MANIFEST_NAME)
    if parse_manifest(content, MANIFEST_NAME, bundle.path) != bundle.manifest:
        raise BundleError(f"{bundle.path} was changed since it was opened", "push it again")
    for name in bundle.manifest.files:
        bundle.verified(name)
    there = place.read(MANIFEST_NAME)
    if there and there != content and not force:
        raise OutputError(f"{url} has another bundle", "pass --force to replace it, or give another URL")
    before = _manifest(there)
    signature = read_signature(bundle.path)
    small = {MANIFEST_NAME: content} | ({SIGNATURE_NAME: signature} if signature is not None else {})
    gone = [name for name in before.files if name not in bundle.manifest.files] if before else []
    gone += [SIGNATURE_NAME] if signature is None and there else []
    if place.protocol == "hf":
        _commit(place, bundle, small, gone)
        return
    sent = [name for name in bundle.manifest.files if not _is_there(place, name, bundle, before)]
    _write(place, bundle, sent, before, small, told)
    with place.writing():
        place.remove(gone)


def _write(
    place: Place, bundle: Bundle, names: Sequence[str], before: Manifest | None, small: dict[str, bytes], told: Told
) -> None:
    """Write the files, then the signature, and the manifest last."""
    over = [name for name in names if before is not None and name in before.files]
    signature = place.read(SIGNATURE_NAME)
    written = []
    with place.writing():
        if over:
            place.remove([MANIFEST_NAME])  # which will not be true from here on
        try:
            for name in names:
                told(name)
                written.append(name)
                place.put(name, bundle.path / name)
            for name in sorted(small, reverse=True):  # the manifest, whose name is the shorter, last
                place.put(name, small[name])
        except BaseException:
            with suppress(Exception):  # what cannot be written may not be there to be removed
                place.remove([*written, *([SIGNATURE_NAME] if signature is None else [])])
                if signature is not None:
                    place.put(SIGNATURE_NAME, signature)
            raise


def _manifest(content: bytes | None) -> Manifest | None:
    """What a place has; None where that is no bundle of this version."""
    if not content:
        return None
    try:
        return parse_manifest(content, MANIFEST_NAME, Path())
    except BundleError:
        return None


def _is_there(place: Place, name: str, bundle: Bundle, before: Manifest | None) -> bool:
    spec = bundle.manifest.files[name]
    return before is not None and before.files.get(name) == spec and place.has(name, spec.size)


def _commit(place: Place, bundle: Bundle, small: dict[str, bytes], gone: Sequence[str]) -> None:
    """Write to the hub: everything in one commit, in a repository that is made if there is none, for oneself only."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    match = _HUB.fullmatch(place.root)
    if match is None:
        raise SettingsError(f"{place.url} names no repository of the hub", "give one, as hf://owner/name")
    repository, revision, folder = match.groups()
    below = f"{folder}/" if folder else ""
    contents: dict[str, Path | bytes] = {name: bundle.path / name for name in bundle.manifest.files} | dict(small)
    added = (CommitOperationAdd(path_in_repo=below + name, path_or_fileobj=each) for name, each in contents.items())
    deleted = (CommitOperationDelete(path_in_repo=below + name) for name in gone if place.has(name))
    with place.writing():
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.create_commit(
            repository,
            [*added, *deleted],
            commit_message=f"cat-bundle push of {bundle.path.name}",
            revision=revision,
        )
