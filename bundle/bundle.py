"""The bundle on disk: opened and verified by production, written atomically by `cat-export`.

A bundle is written into a sibling, `.NAME.partial-PID`, and renamed into place when its manifest, the
last file, is there. A bundle that it replaces is renamed to `.NAME.replaced-PID` first. So whatever an
export dies of, NAME is absent or complete; what it left behind, the next export to NAME clears away. It
leaves alone what a running process of this machine writes, except its own: one export to a NAME at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from cat_pruning.bundle.external_data import external_files
from cat_pruning.bundle.manifest import MANIFEST_NAME, Manifest, read_manifest
from cat_pruning.bundle.outside import listed_files
from cat_pruning.bundle.schema import FileSpec
from cat_pruning.bundle.signatures import PublicKey
from cat_pruning.errors import BundleError, CatError, OutputError
from cat_pruning.files import sha256
from cat_pruning.names import Flavour
from cat_pruning.ours import check_ours, foreign_files

_log = logging.getLogger(__name__)

_NAMED: Final = 3  # how many files an error names
_PARTIAL: Final = re.compile(r"\..+\.partial-\d+")
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# shutil.copytree, safetensors and numpy's tofile lose the errno and keep the words.
_DISK_FULL_WORDS: Final = re.compile("|".join([*map(os.strerror, _DISK_FULL), r"\d+ requested and \d+ written"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle whose manifest holds and whose files have their sizes; `verified` checks what they contain."""

    path: Path
    manifest: Manifest
    public_key: PublicKey | None = field(default=None, compare=False)  # what it was signed with, where that was asked

    @classmethod
    def open(cls, path: str | os.PathLike[str], public_key: PublicKey | None = None) -> Self:
        """Reads and validates the manifest, checks the sizes of the files and reads none of them.

        Args:
            path: the bundle's directory.
            public_key: what it must be signed with; checked before anything else of it is read.

        Raises:
            BundleError: no bundle there, an unfinished one, one of another format version, an edited one, or one that
                is not signed with the key.
        """
        try:
            directory = Path(os.path.realpath(path))
            if _PARTIAL.fullmatch(directory.name):
                raise BundleError(f"{directory} is an unfinished export", "run cat-export again and load its --out")
            if not directory.exists():
                kept = [f", but {path}, which an export was replacing" for path in _siblings(directory, "replaced")]
                raise BundleError(
                    f"{directory} does not exist{''.join(kept)}", "give the --out of cat-export or run it"
                )
            if not directory.is_dir():
                raise BundleError(f"{directory} is a file, expected a directory", "give the --out of cat-export")
            bundle = cls(path=directory, manifest=read_manifest(directory, public_key), public_key=public_key)
            while (error := bundle._incomplete()) is not None:
                if (manifest := read_manifest(directory, public_key)) == bundle.manifest:
                    raise error
                bundle = dataclasses.replace(bundle, manifest=manifest)  # it was changed in its place meanwhile
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            raise BundleError(f"{path} cannot be read ({error})", "make it readable") from error
        return bundle

    def verified(self, name: str) -> Path:
        """The path of one file, named as in the manifest; its SHA-256 checked on first use and after every change.

        A file that refers to another, as step.onnx does to its weights, does not vouch for it: verify both.

        Raises:
            BundleError: the file is not listed, is missing, or is not the one that was exported.
        """
        if name not in self.manifest.files:
            raise self._error(f"lists no file {name!r}, only {', '.join(self.manifest.files)}")
        try:
            path = self._checked_size(name)
            found, expected = _sha256(path), self.manifest.files[name].sha256
        except OSError as error:
            raise BundleError(f"{self.path / name} cannot be read ({error})", "make it readable") from error
        if found != expected:
            raise self._error(f"{name} was changed after the export: its SHA-256 is {found}, expected {expected}")
        return path

    def verify_graphs(self) -> None:
        """Verify the step's graphs and the files that they refer to, all that runs without a plan.

        Raises:
            BundleError: as `verified`; also where a graph refers to a file that is not one of the bundle's.
        """
        for graph in self.manifest.graphs:
            self.verify_graph(graph.file)

    def verify_graph(self, file: str) -> Path:
        """Verify one graph and the files that it refers to, and return its path. Raises as `verify_graphs`."""
        path = self.verified(file)
        for name in external_files(path):
            self.verified(name)
        return path

    def verified_tree(self, prefix: str) -> Path:
        """The path of a directory, every file below it verified and none there that is not listed.

        For loaders that take what they find: pickled weights laid beside the exported ones would be loaded.

        Raises:
            BundleError: a file is not listed, is missing, or is not the one that was exported.
        """
        listed = [name for name in self.manifest.files if name.startswith(f"{prefix}/")]
        if not listed:
            raise self._error(f"lists no files below {prefix}/")
        present = {path.relative_to(self.path).as_posix() for path in _files_below(self.path / prefix)}
        if added := sorted(present - set(listed)):
            more = f" and {len(added) - _NAMED} more" if len(added) > _NAMED else ""
            raise self._error(f"{', '.join(added[:_NAMED])}{more} added after the export", "remove that, or ")
        for name in listed:
            self.verified(name)
        return self.path / prefix

    def add_plans_command(self, flavour: Flavour) -> str:
        """The shell command that adds plans for this machine to the bundle."""
        return self.manifest.add_plans_command(self.path, flavour)

    def export_command(self, *flavours: Flavour) -> str:
        """The shell command that makes this bundle again in place, with plans for `flavours` besides those it has."""
        return self.manifest.export_command(self.path, *flavours)

    def _incomplete(self) -> BundleError | None:
        """What is wrong with a file's presence or size."""
        try:
            for name in self.manifest.files:
                self._checked_size(name)
        except BundleError as error:
            return error
        return None

    def _checked_size(self, name: str) -> Path:
        path, expected = self.path / name, self.manifest.files[name].size
        try:
            status = path.stat()  # once: it may be dropped meanwhile
        except (FileNotFoundError, NotADirectoryError):
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            raise self._error(f"{name} is missing, expected {expected} bytes")
        if status.st_size != expected:
            raise self._error(f"{name} has {status.st_size} bytes, expected {expected}: truncated or edited")
        return path

    def _error(self, problem: str, remedy: str = "") -> BundleError:
        return BundleError(f"{self.path}: {problem}", f"{remedy}run cat-export again: {self.export_command()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleWriter:
    """A bundle in the making; files go into `path`, and `commit` turns it into the bundle at `out`."""

    path: Path
    out: Path
    force: bool

    def commit(self, manifest: Manifest) -> Bundle:
        """Lists every file, synced to disk, in the manifest, writes that and renames the directory into place.

        Raises:
            OutputError: something has appeared at `out` that may not be replaced, or a file is a link.
        """
        files = {}
        for path in sorted(_files_below(self.path)):
            if path.is_symlink():  # into a download cache, say, that is emptied one day
                raise OutputError(f"{path} is a link to {path.readlink()}", "copy the file into the bundle")
            _sync(path)
            files[path.relative_to(self.path).as_posix()] = FileSpec(size=path.stat().st_size, sha256=_sha256(path))
        files.pop(MANIFEST_NAME, None)
        complete = manifest.with_files(files)
        return self._moved((complete.model_dump_json(indent=2) + "\n").encode(), complete)

    def place(self, content: bytes, manifest: Manifest) -> Bundle:
        """Rename the directory into place with a manifest as it is, whose files are there and were hashed.

        Args:
            content: of the manifest's file.
            manifest: what it says.

        Raises:
            OutputError: something has appeared at `out` that may not be replaced.
        """
        for path in _files_below(self.path):
            _sync(path)
        return self._moved(content, manifest)

    def _moved(self, content: bytes, manifest: Manifest) -> Bundle:
        path = self.path / MANIFEST_NAME
        path.write_bytes(content)
        _sync(path)
        check_replaceable(self.out, force=self.force)
        _swap_in(self.path, self.out)
        return Bundle(path=self.out, manifest=manifest)


@contextlib.contextmanager
def new_bundle(out: Path, *, force: bool, needed_bytes: int) -> Iterator[BundleWriter]:
    """Writes a bundle whole or not at all; the block ends with `writer.commit`, or raises.

    Args:
        out: the bundle's directory. What is missing of its parents is created.
        force: replace a bundle, or an empty directory, that is there; nothing else ever is replaced.
        needed_bytes: an estimate of the bundle's size, for the check of the free space and for messages.

    Raises:
        OutputError: `out` exists and may not be replaced, cannot be written, or the disk is (or becomes) full.
    """
    out = Path(os.path.realpath(out))
    check = functools.partial(check_replaceable, out, force=force)
    with _partial(out, check, needed_bytes, "give an --out that you may write to") as partial:
        yield BundleWriter(path=partial, out=out, force=force)
        if partial.exists():
            raise RuntimeError("the block of new_bundle ended without commit")


@contextlib.contextmanager
def beside_bundle(directory: Path, *, needed_bytes: int) -> Iterator[Path]:
    """An empty directory beside a bundle, for files that are to be moved into it. Cleared away as `new_bundle` does.

    Raises:
        OutputError: it cannot be written, or the disk is (or becomes) full.
    """
    with _partial(directory, lambda: None, needed_bytes, "make its folder writable") as partial:
        yield partial


@contextlib.contextmanager
def _partial(out: Path, check: Callable[[], None], needed_bytes: int, remedy: str) -> Iterator[Path]:
    """The partial directory of `out`, gone when the block ends, unless it was renamed."""
    partial = _sibling(out, "partial")
    try:
        _prepare(out, partial, check, needed_bytes, remedy)
        yield partial
    except Exception as error:
        _remove(partial)  # before the free space is told
        if not is_disk_full(error):
            raise
        problem, remedy = _space(out, needed_bytes)
        raise OutputError(f"disk full ({error}): {problem}", remedy) from error
    finally:
        _remove(partial)  # KeyboardInterrupt and SystemExit too


def _prepare(out: Path, partial: Path, check: Callable[[], None], needed_bytes: int, remedy: str) -> None:
    """Refuses what can be refused before the work, and makes the partial directory."""
    try:
        _clear_stale(out)
        check()
        if _free_bytes(out) < needed_bytes:
            raise OutputError(*_space(out, needed_bytes))
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error})", remedy) from error


def check_replaceable(out: Path, *, force: bool) -> None:
    """Check that nothing is at `out`, or, with `force`, nothing but a bundle or an empty directory.

    Raises:
        OutputError: something else is, or `out` is in another bundle. Of a directory, the files that no manifest of a
            bundle there lists are named.
    """
    place = Path(os.path.realpath(out))
    if around := next((parent for parent in place.parents if listed_files(parent)), None):
        raise OutputError(f"{out} would be in the bundle {around}, among its own files", "give another --out")
    if not out.exists():
        return
    if place.is_mount():  # "." itself always seems one: its parent is itself
        raise OutputError(f"{out} is a mount point, which cannot be replaced", f"give --out {out / 'bundle'}")
    # First what --force would not help.
    if not out.is_dir():
        raise OutputError(f"{out} is a file, and --force replaces only bundles", "give another --out")
    check_ours(out, listed_files(out), ("*",), f"a bundle's {MANIFEST_NAME}", "give another --out")
    if not force:
        raise OutputError(f"{out} exists", "pass --force to replace it or give another --out")


def unlisted_files(bundle: Bundle) -> list[str]:
    """The files in a bundle's directory that are none of its own, by their names there.

    Raises:
        OSError: it cannot be read.
    """
    return foreign_files(bundle.path, listed_files(bundle.path))


def _swap_in(partial: Path, out: Path) -> None:
    """Renames the complete partial directory to `out`; what was there is back in place if that fails."""
    replaced = _sibling(out, "replaced")
    try:
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
    except BaseException as error:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        if isinstance(error, OSError) and error.errno not in _DISK_FULL:
            raise OutputError(
                f"{partial} cannot be renamed to {out} ({error.strerror})", "give another --out"
            ) from error
        raise
    _remove(replaced)


def _clear_stale(out: Path) -> None:
    """Removes what exports to `out` that were killed have left, and puts back a bundle that one was replacing."""
    for path in _siblings(out, "replaced"):
        if not _runs(path) and not out.exists():
            path.rename(out)
    for path in (*_siblings(out, "partial"), *_siblings(out, "replaced")):
        if not _runs(path):
            _remove(path)


def _runs(path: Path) -> bool:
    """Whether the process that a partial or replaced directory is named for is another one, and runs."""
    pid = int(path.name.rpartition("-")[2])
    with contextlib.suppress(ProcessLookupError, OverflowError):
        os.getpgid(pid)  # unlike os.kill, answers for another user's process too
        # This process has just started: a name with its number was left by one before it, in a container for instance.
        return pid != os.getpid()
    return False


def _sibling(out: Path, role: str) -> Path:
    return out.with_name(f".{out.name}.{role}-{os.getpid()}")


def _siblings(out: Path, role: str) -> list[Path]:
    """Those of every process, this one's included."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.{role}-\d+")
    return [path for path in out.parent.iterdir() if pattern.fullmatch(path.name)] if out.parent.is_dir() else []


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        _log.warning("%s could not be removed; remove it yourself", directory)


def _files_below(directory: Path) -> list[Path]:
    """Everything but directories; links to directories too, which a loader would follow."""
    return [path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()]


def _sha256(path: Path) -> str:
    status = path.stat()
    return _hashed(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.cache
def _hashed(path: Path, size: int, mtime_ns: int, ctime_ns: int) -> str:
    """SHA-256 of a file; what comes after the path only tells one state of the file from another."""
    return sha256(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def is_disk_full(error: Exception) -> bool:
    """Whether an error says that there is no room, however a library says it."""
    known = isinstance(error, OSError) and error.errno in _DISK_FULL
    return known or (not isinstance(error, CatError) and _DISK_FULL_WORDS.search(str(error)) is not None)


def _free_bytes(out: Path) -> int:
    return shutil.disk_usage(next(parent for parent in out.parents if parent.exists())).free


def _space(out: Path, needed_bytes: int) -> tuple[str, str]:
    """That there is not enough, and what to do."""
    needed, free = (f"{num_bytes / 2**30:.4g} GiB" for num_bytes in (needed_bytes, _free_bytes(out)))
    return f"{out} needs about {needed}, {free} free on that disk", "make room or give another --out"
