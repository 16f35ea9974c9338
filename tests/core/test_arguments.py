from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cat_pruning import arguments
from cat_pruning.arguments import check_outputs, guidance, list_of, number, resolution, text, whole
from cat_pruning.errors import OutputError, SettingsError


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (whole(1, 10), "1", 1),
        (whole(1, 10), " +10 ", 10),
        (whole(-5, 10), "-5", -5),
        (number(0, 1), "0.25", 0.25),
        (number(0, 1), "1e-3", 0.001),
        (guidance, "-1000", -1000.0),
        (list_of(whole(1, 10)), "3, 1,3", (3, 1)),
        (list_of(str), "a,b", ("a", "b")),
        (resolution, "64x96", (64, 96)),
        (resolution, "64×65536", (64, 65536)),
        (text, "größer", "größer"),
        (text, os.fsdecode("größer".encode()), "größer"),
        (text, "gr\udcc3\udcb6\udcc3\udc9fer", "größer"),  # as Python decodes it in the locale C
        (arguments.path, "[red]/a b", Path("[red]/a b")),
    ],
)
def test_what_makes_sense_is_taken(kind: Callable[[str], Any], given: str, value: object) -> None:
    assert kind(given) == value


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (whole(1, 10), "0", "'0': expected a whole number from 1 to 10"),
        (whole(1, 10), "11", "from 1 to 10"),
        (whole(1, 10), "9" * 9999, f"'{'9' * 40}…': expected"),
        *((whole(1, 10), given, "a whole number") for given in ("", "1.5", "1e3", "x", "nan", "٣", "1_0", "0x1")),
        *((number(0, 1), given, "a number from 0 to 1") for given in ("nan", "inf", "-1e-9", "1.5", "1e999", "", "x")),
        (guidance, "1e30", "'1e30': expected a number from -1000 to 1000"),
        (list_of(whole(1, 10)), "1,,2", "an empty value"),
        (list_of(whole(1, 10)), "1,99", "'99': expected a whole number"),
        (list_of(float), "1,x", "with commas between"),
        (resolution, "64", "like 1024x768"),
        (resolution, f"{10**12}x64", "like 1024x768"),
        (resolution, "65537x64", "sides of 65536 pixels at most"),
        (text, "gr\udcf6", "this is not UTF-8"),
        (text, "a\0b", "a null character"),
        (arguments.path, "", "this is no path"),
        (arguments.path, "a\0b", "this is no path"),
    ],
)
def test_what_makes_none_is_named(kind: Callable[[str], Any], given: str, said: str) -> None:
    with pytest.raises(ArgumentTypeError) as error:
        kind(given)
    assert said in str(error.value)
    assert len(str(error.value)) < 200


def test_outputs_are_checked_before_they_are_there(tmp_path: Path) -> None:
    check_outputs([("--out", tmp_path / "a.png"), ("--summary", tmp_path / "b.json")])
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        OutputError, match=r"--summary .*folder cannot be written \(Is a directory\); give another path"
    ):
        check_outputs([("--out", tmp_path / "a.png"), ("--summary", tmp_path / "folder")])
    (tmp_path / "link").symlink_to("a.png")
    for other in ("a.png", "folder/../a.png", "link"):
        with pytest.raises(SettingsError, match=r"--summary .* is the same file as --out .*a.png"):
            check_outputs([("--out", tmp_path / "a.png"), ("--summary", tmp_path / other)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]
