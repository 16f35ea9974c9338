from __future__ import annotations

from pathlib import Path

import pytest

from cat_pruning.errors import OutputError
from cat_pruning.ours import check_ours, foreign_files, remove_ours

LISTED = {"run.json", "images/a/0.png", "images/a/1.png"}
PLACES = ("run.json", "images", "batch-*.bin")


def make(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)


def left(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        ("images/holiday.jpg", True),
        ("images/a/0.jpg", True),
        ("images/a/2.png", True),
        ("images/.hidden/x", True),
        ("batch-7.bin", True),
        ("images/a/.2.png.12-34.part", True),
        ("images/a/.1.png.12-34.part", False),  # ours, left by a process that died
        (".run.json.1-1.part", False),
        ("notes.txt", False),  # not where the tool writes
        ("batch-7.txt", False),
    ],
)
def test_what_is_not_listed_in_our_places_is_named(tmp_path: Path, name: str, foreign: bool) -> None:
    make(tmp_path, *LISTED, name)
    assert foreign_files(tmp_path, LISTED, PLACES) == ([name] if foreign else [])
    if foreign:
        with pytest.raises(OutputError, match=rf"{tmp_path} has {name}, not listed by a record: .*; move that away"):
            check_ours(tmp_path, LISTED, PLACES, "a record", "give another")
    else:
        check_ours(tmp_path, LISTED, PLACES, "a record", "give another")
    assert left(tmp_path) == sorted({*LISTED, name})


def test_many_are_counted(tmp_path: Path) -> None:
    make(tmp_path, *(f"images/{number}" for number in range(5)))
    with pytest.raises(OutputError, match=r"has images/0, images/1, images/2 and 2 more, not listed"):
        check_ours(tmp_path, LISTED, PLACES, "a record", "give another")
    check_ours(tmp_path, LISTED, PLACES, "a record", "give another", among={"images/9"})


def test_only_what_is_listed_is_deleted_and_the_record_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = ("notes.txt", "images/b/mine.png", "images/a/2.png")
    make(tmp_path, *LISTED, *others, "images/a/.0.png.1-2.part")
    deleted = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (deleted.append(path.name), unlink(path, **options)))
    remove_ours(tmp_path, LISTED, PLACES, "run.json")
    assert left(tmp_path) == sorted(others)
    assert sorted(deleted) == [".0.png.1-2.part", "0.png", "1.png", "run.json"]
    assert deleted[-1] == "run.json"


def test_folders_go_when_they_are_empty(tmp_path: Path) -> None:
    make(tmp_path, *LISTED)
    remove_ours(tmp_path, LISTED, PLACES, "run.json")
    assert list(tmp_path.iterdir()) == []


def test_what_a_link_leads_to_is_not_ours(tmp_path: Path) -> None:
    make(tmp_path, "elsewhere/a/0.png", "out/run.json")
    (tmp_path / "out" / "images").symlink_to(tmp_path / "elsewhere")
    assert foreign_files(tmp_path / "out", LISTED, PLACES) == ["images"]
    remove_ours(tmp_path / "out", LISTED, PLACES, "run.json")
    assert left(tmp_path / "elsewhere") == ["a/0.png"]


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert foreign_files(tmp_path / "nowhere", LISTED, PLACES) == []
