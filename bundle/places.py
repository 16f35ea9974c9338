"""Where bundles are pushed to and pulled from: any storage that fsspec knows by a URL, the hub among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self

from cat_pruning.errors import BundleError, CatError, InstallationError, OutputError, SettingsError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_MOST_BYTES: Final = 1 << 28  # of a manifest; a place that sends more is none of ours
_LONGEST: Final = 200  # characters of what a library says


def is_url(place: str | Path) -> bool:
    """Whether this is an address, as hf://owner/name or s3://bucket/sd3, and no path."""
    return isinstance(place, str) and _URL.match(place) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder of a storage. Names are of files in it, with "/".

    Attributes:
        url: as it was given.
        files: fsspec's file system.
        root: the folder in it.
    """

    url: str
    files: AbstractFileSystem
    root: str

    @classmethod
    def of(cls, url: str) -> Self:
        """The place that a URL names. Access is what the storage's own library finds: its variables and files.

        Raises:
            InstallationError: the package for this kind of storage is not installed.
            SettingsError: there is no such kind.
        """
        import fsspec

        try:
            files, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise InstallationError(f"{url}: {_said(error)}", "pip install what it names") from error
        except ValueError as error:
            raise SettingsError(
                f"{url} is no address of a storage ({_said(error)})", "give one, as s3://bucket/sd3 or hf://owner/name"
            ) from error
        except Exception as error:
            raise _not_read(url, error) from error
        files.invalidate_cache()  # listings, which the process may have kept
        return cls(url=url.rstrip("/"), files=files, root=str(root).rstrip("/"))

    @classmethod
    def local(cls, directory: Path) -> Self:
        """A directory of this machine."""
        from fsspec.implementations.local import LocalFileSystem

        return cls(url=str(directory), files=LocalFileSystem(), root=str(directory))

    @property
    def directory(self) -> Path | None:
        """The directory of this machine that it is, if it is one."""
        return Path(self.root) if self.protocol in ("file", "local") else None

    @property
    def protocol(self) -> str:
        """Of the storage: s3, hf, memory."""
        protocol = self.files.protocol
        return protocol if isinstance(protocol, str) else str(protocol[0])

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none.

        Raises:
            BundleError: it cannot be read.
        """
        with self.opened(name) as file:
            return None if file is None else self.next_bytes(file, _MOST_BYTES)

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO | None]:
        """A file to read from its beginning; None where there is none.

        Raises:
            BundleError: it cannot be read.
        """
        # The hub's client reads ahead in blocks, each a request of its own, unless it is to stream.
        options = {"block_size": 0} if self.protocol == "hf" else {}
        try:
            file: Any = self.files.open(self.path(name), "rb", **options) if self.has(name) else None
        except CatError:
            raise
        except Exception as error:
            raise _not_read(self.url, error) from error
        try:
            yield file
        finally:
            if file is not None:
                file.close()

    def next_bytes(self, file: BinaryIO, size: int) -> bytes:
        """The next bytes of an opened file, at most so many; none at its end.

        Raises:
            BundleError: they cannot be read.
        """
        try:
            return file.read(size)
        except Exception as error:
            raise _not_read(self.url, error) from error

    def has(self, name: str, size: int | None = None) -> bool:
        """Whether there is such a file, and of this size in bytes, if one is given.

        Raises:
            BundleError: it cannot be told.
        """
        try:
            found = self.files.info(self.path(name))  # unlike `exists`, it tells of a storage that is not reached
            return found["type"] == "file" and size in (None, found["size"])
        except (FileNotFoundError, NotADirectoryError):
            return False
        except Exception as error:
            raise _not_read(self.url, error) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Meanwhile, what the storage's library raises is an `OutputError`."""
        try:
            yield
        except CatError:
            raise
        except Exception as error:
            raise OutputError(
                f"{self.url} cannot be written ({_said(error)})",
                "check the address, the network and that you may write there, and push again",
            ) from error

    def put(self, name: str, content: Path | bytes) -> None:
        """Write a file: a copy of one of this machine, or some bytes. Raises what the storage's library raises."""
        path = self.path(name)
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        if isinstance(content, bytes):
            self.files.pipe_file(path, content)
        else:
            self.files.put_file(str(content), path)

    def remove(self, names: Iterable[str]) -> None:
        """Delete files, as far as they are there. Raises what the storage's library raises."""
        for name in names:
            try:
                self.files.rm_file(self.path(name))
            except FileNotFoundError:
                continue

    def path(self, name: str) -> str:
        """Of a file, in the file system."""
        return f"{self.root}/{name}"


def _not_read(url: str, error: Exception) -> BundleError:
    """Every storage's library has errors of its own."""
    return BundleError(
        f"{url} cannot be read ({_said(error)})", "check the address, the network and that you may read there"
    )


def _said(error: Exception) -> str:
    """What an error of a library says, on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:_LONGEST]
