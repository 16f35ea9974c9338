"""Files of prompts: plain lines, PartiPrompts' tables, DrawBench's, COCO's captions.

What would make other prompts than the file's author meant is refused: a field that a comma has cut off, a quotation
mark that takes the rest of the file with it, characters that no text has.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from cat_pruning.checked import shown
from cat_pruning.errors import SettingsError
from cat_pruning.files import parse_json, read_text

# The prompts' column by the file's ending, and whose form it is.
_COLUMNS: Final = {".tsv": ("Prompt", "PartiPrompts"), ".csv": ("Prompts", "DrawBench")}
_NOT_TEXT: Final = re.compile("[\0\ud800-\udfff]")  # JSON can spell half a character


def prompts_of_file(file: Path, otherwise: str) -> list[str]:
    """The prompts of a file, in its order, without space around them; empty ones are left out.

    Args:
        file: in UTF-8: .tsv as PartiPrompts (a header, with the column Prompt), .csv as DrawBench (likewise, with the
            column Prompts), .json as the captions of COCO (the first of every image), any other with one prompt a line.
        otherwise: what else could be given, for errors.

    Raises:
        SettingsError: no such file, one of another form, one without prompts.
    """
    text, suffix = _read(file, otherwise), file.suffix.lower()
    if suffix in _COLUMNS:
        found = _column(file, text, *_COLUMNS[suffix])
    elif suffix == ".json":
        found = _coco_captions(file, text)
    else:
        found = re.split(r"\r\n|\r|\n", text)  # `splitlines` ends lines at characters that a prompt may have
    prompts = [stripped for prompt in found if (stripped := prompt.strip())]
    for prompt in prompts:
        if _NOT_TEXT.search(prompt):
            raise SettingsError(
                f"{file}: {shown(prompt)} has a character that no text has", "save the file as UTF-8, and look at it"
            )
    if not prompts:
        raise SettingsError(f"{file} has no prompts")
    return prompts


def _read(file: Path, otherwise: str) -> str:
    try:
        return read_text(file)
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file} is not UTF-8 (byte {error.start})", "save it as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{file} cannot be read ({reason})", f"give a file of prompts, or {otherwise}") from error


def _column(file: Path, text: str, column: str, form: str) -> list[str]:
    separated = "tab" if file.suffix.lower() == ".tsv" else "comma"
    try:
        rows = _rows(text, separated)
        _, header = next(rows, (0, [column]))
        if header.count(column) != 1:
            columns = shown(", ".join(header))
            raise SettingsError(f"{file} has the columns {columns}: expected one {column} among them, as in {form}")
        found = []
        for line, row in rows:
            if len(row) > len(header) or len(row) <= header.index(column):
                raise SettingsError(
                    f"{file}, line {line}: {len(row)} fields, and {len(header)} columns",
                    "in a table with commas, text that has some is in quotation marks",
                )
            found.append(row[header.index(column)])
        return found
    except csv.Error as error:
        raise SettingsError(f"{file} is no table of {separated}-separated values ({error})") from error


def _rows(text: str, separated: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its last line."""
    lines = io.StringIO(text, newline="")
    if separated == "tab":
        # PartiPrompts has quotation marks as they are, without a second pair around the field.
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, strict=True)
    return ((reader.line_num, row) for row in reader if any(field.strip() for field in row))


def _coco_captions(file: Path, text: str) -> list[str]:
    """The first caption of every image, in the order of the images' first captions."""
    captions: dict[Any, str] = {}
    try:
        for annotation in parse_json(text)["annotations"] if text.strip() else ():
            captions.setdefault(annotation["image_id"], annotation["caption"] + "")
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(
            f'{file} is not of the form {{"annotations": [{{"image_id": 1, "caption": "..."}}, ...]}}, as COCO\'s '
            f"captions are ({type(error).__name__}: {error})"
        ) from error
    return list(captions.values())
