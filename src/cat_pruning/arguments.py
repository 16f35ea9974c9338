"""Arguments of the command lines: the parser, the kinds of values, and the files that a tool is to write.

Whatever makes no sense, or more than anyone could mean, is refused here in words, before anything is imported.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.files import check_writable, check_writable_directory
from cat_pruning.terminal import visible

# More than anyone has asked for, and little enough to count to.
MOST_STEPS: Final = 10_000
MOST_PROMPTS: Final = 4096  # of a batch
MOST_TEXT: Final = 65_536  # tokens
MOST_SEEDS: Final = 10_000  # images of a prompt
MOST_WORKERS: Final = 10_000
MOST: Final = 10**9  # of what costs nothing by itself
_MOST_PIXELS: Final = 65_536  # of a side
_SHOWN: Final = 40  # characters of a value in an error
_T = TypeVar("_T")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error of the tools."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"{self.prog}: {visible(' '.join(message.split()))}; see {self.prog} --help\n")

    def print_help(self, file: Any = None) -> None:
        """Write the help; unlike argparse, not in silence where it cannot be written."""
        (file or sys.stdout).write(self.format_help())


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        # Python itself refuses to read numbers of thousands of digits.
        if re.fullmatch(r"\s*[+-]?[0-9]{1,30}\s*", text) and least <= (value := int(text)) <= most:
            return value
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a whole number from {least} to {most}")

    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """The type of an argument that is a number from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if least <= value <= most:
            return value
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a number from {least:g} to {most:g}")

    return parse


guidance = number(-1000.0, 1000.0)


def list_of(kind: Callable[[str], _T]) -> Callable[[str], tuple[_T, ...]]:
    """The type of an argument of several values, commas between; each is taken once."""

    def parse(text: str) -> tuple[_T, ...]:
        parts = [part.strip() for part in text.split(",")]
        if "" in parts:
            raise argparse.ArgumentTypeError(f"{shown(text)}: an empty value; expected values with commas between")
        try:
            return tuple(dict.fromkeys(map(kind, parts)))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(text)}: expected values with commas between ({error})") from error

    return parse


def resolution(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels, as an argument."""
    match = re.fullmatch(r"([0-9]{1,9})[xX×]([0-9]{1,9})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected HEIGHTxWIDTH in pixels, like 1024x768")
    height, width = int(match[1]), int(match[2])
    if max(height, width) > _MOST_PIXELS:
        raise argparse.ArgumentTypeError(f"{text}: expected sides of {_MOST_PIXELS} pixels at most")
    return height, width


def text(argument: str) -> str:
    """A text, as an argument: UTF-8 whatever the locale is.

    In the locale C, without Python's UTF-8 mode, Python hands over the bytes that are not ASCII one by one.
    """
    try:
        decoded = os.fsencode(argument).decode("utf-8")
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"{shown(argument)}: this is not UTF-8") from error
    if "\0" in decoded:
        raise argparse.ArgumentTypeError(f"{shown(argument)}: it has a null character")
    return decoded


def path(argument: str) -> Path:
    """A path, as an argument."""
    if not argument or "\0" in argument:
        raise argparse.ArgumentTypeError(f"{shown(argument)}: this is no path")
    return Path(argument)


def place(argument: str) -> Path | str:
    """A path, or a URL, as an argument."""
    return argument if "://" in argument and "\0" not in argument else path(argument)


def shown(argument: str) -> str:
    """An argument as an error quotes it: cut off where nobody would read on."""
    return repr(argument if len(argument) <= _SHOWN else argument[:_SHOWN] + "…")


def check_outputs(outputs: Iterable[tuple[str, Path]]) -> None:
    """Check that files can be written, before there is anything to write. Nothing is changed.

    Args:
        outputs: the files, each with the option that names it.

    Raises:
        OutputError: one of them cannot be written.
        SettingsError: two of them are one file.
    """
    taken: dict[str, str] = {}
    for option, file in outputs:
        try:
            check_writable(file)
        except OSError as error:
            raise OutputError(
                f"{option} {file} cannot be written ({error.strerror or error})", "give another path"
            ) from error
        other = taken.setdefault(os.path.realpath(file), f"{option} {file}")
        if other != f"{option} {file}":
            raise SettingsError(f"{option} {file} is the same file as {other}", "give another path")


def check_output_directory(option: str, directory: Path) -> None:
    """Check that a directory is there and can be written to, or can be made. Nothing is changed.

    Raises:
        OutputError: neither.
    """
    try:
        check_writable_directory(directory)
    except OSError as error:
        raise OutputError(
            f"{option} {directory} cannot be written ({error.strerror or error})", "give another directory"
        ) from error
