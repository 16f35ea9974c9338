from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from cat_pruning.files import (
    check_writable,
    check_writable_directory,
    read_json,
    read_text,
    replacing,
    sha256,
    write_whole,
)


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "größer")
    assert path.read_bytes() == "größer".encode()
    write_whole(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert sha256(path) == hashlib.sha256(b"\x00").hexdigest()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_threads_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as part:
        part.write_text("half")
        other = threading.Thread(target=write_whole, args=(path, "the other's"))
        other.start()
        other.join()
        assert path.read_text() == "the other's"
        assert part.read_text() == "half"
        part.write_text("whole")
    assert path.read_text() == "whole"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "after"


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(pipe, "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        write_whole(tmp_path / "pipe", "for nobody")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "file", "")


def test_a_place_that_a_folder_has(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "folder", "")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_what_a_link_leads_to_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("before")
    (tmp_path / "link").symlink_to("folder/file")

    def full(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "link", "after")
    assert (tmp_path / "folder" / "file").read_text() == "before"
    assert [each.name for each in (tmp_path / "folder").iterdir()] == ["file"]


# ------------------------------------------------------------------ what can be written


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder with all that can stand in a file's place."""
    (tmp_path / "file").write_text("before")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/file")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def below(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("new", None),
        ("file", None),
        ("link", None),
        ("pipe", "no file, but a pipe"),
        ("folder", "Is a directory"),
        ("file/new", "Not a directory"),
        ("nowhere/new", "No such file"),
        ("dangling", "No such file"),
        ("loop", "Too many levels"),
        ("x" * 300, "name too long"),
        ("a\0b", "no name of a file"),
        ("/", "no name of a file"),
        (".", "no name of a file"),
        ("/dev/null", None),
    ],
)
def test_what_cannot_be_written_is_told_beforehand(places: Path, name: str, reason: str | None) -> None:
    before = below(places)
    path = Path(name) if name == "." else places / name
    if reason is None:
        check_writable(path)
    else:
        with pytest.raises(OSError, match=reason):
            check_writable(path)
    assert below(places) == before
    assert (places / "file").read_text() == "before"


def test_a_file_that_is_write_protected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for anyone but root
    with pytest.raises(PermissionError):
        check_writable(tmp_path / "file")
    with pytest.raises(PermissionError):
        check_writable_directory(tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", None),
        ("new", None),
        ("new/and/newer", None),
        ("file", "no directory"),
        ("file/new", "no directory"),
        ("pipe/new", "no directory"),
        ("loop", "Too many levels"),
        ("loop/new", "Too many levels"),
        ("x" * 300, "name too long"),
        ("a\0b", "no name of a directory"),
        ("/", "no name of a directory"),
    ],
)
def test_a_directory_that_cannot_be_written_is_told_beforehand(places: Path, name: str, reason: str | None) -> None:
    before = below(places)
    if reason is None:
        check_writable_directory(places / name)
    else:
        with pytest.raises(OSError, match=reason):
            check_writable_directory(places / name)
    assert below(places) == before


# ------------------------------------------------------------------ what is read


def test_text_is_read_with_and_without_a_mark(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbf{}")
    assert read_text(tmp_path / "file") == "{}"
    assert read_json(tmp_path / "file") == {}


@pytest.mark.parametrize("name", ["folder", "pipe", "loop", "dangling", "nowhere", "x" * 300, "/dev/zero", "/dev/null"])
def test_what_is_no_file_is_not_waited_for(places: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"no file|directory|levels|too long"):
        read_text(places / name)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"{", b"[" * 99999, b'{"a":' * 99999, b"9" * 9999])
def test_what_is_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"nested|decode|Expect|4300 digits"):
        read_json(tmp_path / "file")


def test_a_path_with_a_null_character(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="null"):
        read_text(tmp_path / "a\0b")


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="1099511627776 bytes, expected 1073741824 at most"):
        read_text(tmp_path / "sparse")


def test_what_a_shell_pipes_in_is_read(tmp_path: Path) -> None:
    """As `<(…)` does: a pipe without a name, whose writer is there."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        file.write("through")
    assert read_text(Path(f"/dev/fd/{reader}")) == "through"
    os.close(reader)
