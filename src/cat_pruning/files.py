"""Files that are written whole or not at all, and text that is read of real files only."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

_MOST_BYTES: Final = 1 << 30  # of a text; what is larger was not written by us, and would fill the memory


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when the block ends, and is gone when it fails.

    The place is taken by a rename, so a reader sees the old file or the new one. Two threads or processes that write
    one path do not meet; the last one wins.

    Raises:
        OSError: the file cannot be put in place.
    """
    part = _beside(path)
    try:
        yield part
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, in UTF-8 if it is text: see `replacing`. What a link leads to is replaced, and the link stays.

    Devices are written to, and pipes that somebody reads.

    Raises:
        OSError: it cannot be written, as where nobody reads a pipe; what was there is as it was.
    """
    _check_name(path)
    data = content.encode() if isinstance(content, str) else content
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if _is_stream(target):
        with open(target, "wb", opener=_never_waiting) as stream:
            os.set_blocking(stream.fileno(), True)
            stream.write(data)
        return
    with replacing(target) as part:
        part.write_bytes(data)


def check_writable(path: Path) -> None:
    """Check that `write_whole` can write a file, by beginning to. Nothing is changed.

    Raises:
        OSError: it cannot, and why; or it is a pipe, a socket or a disk. Who reads a pipe cannot be told beforehand.
    """
    _check_name(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if _exists(target) and not os.access(target, os.W_OK):  # a rename would not ask
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if _is_stream(target):
        if not target.is_char_device():  # as /dev/null is, and a terminal
            raise OSError(errno.EINVAL, "it is no file, but a pipe, a socket or a disk")
    else:
        part = _beside(target)
        part.touch()
        part.unlink()


def check_writable_directory(directory: Path) -> None:
    """Check that files can be written into a directory that is there, or that can be made. Nothing is changed.

    Raises:
        OSError: they cannot, and why.
    """
    if "\0" in str(directory) or not directory.absolute().name:
        raise OSError(errno.EINVAL, "this is no name of a directory of yours")
    place = directory.absolute()
    while not _exists(place):
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{'it' if place == directory else place} is no directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def open_file(path: Path) -> BinaryIO:
    """Open a file to read, which never waits.

    A pipe that has a name is refused: nobody may ever write to it. One that a shell has made, as `<(…)` does, is read.

    Raises:
        OSError: there is no such file, or it is a directory, a named pipe or a device.
        ValueError: the path has a null character.
    """
    file = open(path, "rb", opener=_never_waiting)  # noqa: SIM115
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and _is_nameless(path)):
        file.close()
        raise OSError(errno.EINVAL, "this is no file")
    os.set_blocking(file.fileno(), True)
    return file


def read_text(path: Path) -> str:
    """The text of a file, which is UTF-8 and may begin with a mark that says so.

    Raises:
        OSError: as `open_file`, or it is larger than 1 GiB.
        ValueError: it is not UTF-8, or the path has a null character.
    """
    return decoded(read_bytes(path))


def decoded(content: bytes) -> str:
    """Text in UTF-8, which may begin with a mark that says so.

    Raises:
        ValueError: it is not UTF-8.
    """
    return content.decode("utf-8-sig")


def read_bytes(path: Path) -> bytes:
    """The content of a small file.

    Raises:
        OSError: as `open_file`, or it is larger than 1 GiB.
        ValueError: the path has a null character.
    """
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > _MOST_BYTES:
            raise OSError(errno.EFBIG, f"{size} bytes, expected {_MOST_BYTES} at most")
        return file.read()


def read_json(path: Path) -> Any:
    """What the JSON of a file says; see `read_text`.

    Raises:
        OSError: as `read_text`.
        ValueError: it is not JSON or not UTF-8, or is nested more deeply than anything of ours.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is not JSON, or is nested more deeply than anything of ours.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _never_waiting(name: str, flags: int) -> int:
    """An opener that waits for no other end of a pipe."""
    return os.open(name, flags | os.O_NONBLOCK, 0o666)


def _check_name(path: Path) -> None:
    if not path.name or "\0" in str(path):
        raise OSError(errno.EINVAL, "this is no name of a file")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.part")


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_stream(path: Path) -> bool:
    """Whether there is something that cannot be replaced, but for a directory."""
    return _exists(path) and not path.is_file() and not path.is_dir()


def _is_nameless(path: Path) -> bool:
    return not _exists(Path(os.path.realpath(path)))
