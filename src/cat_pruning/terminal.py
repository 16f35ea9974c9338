"""What the tools print: text as it is, lines that stay whole where no terminal ends them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.status import Status

_OBEYED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_WIDE = 10_000  # columns of what is no terminal: a table's cell has all that it needs


def terminal(*, stderr: bool = False, file: TextIO | None = None) -> Console:
    """Where a tool prints: standard output, standard error, or a file.

    Brackets in a path are brackets, and no markup. In a pipe or a file no line is broken, unless
    COLUMNS says where.
    """
    from rich.console import Console

    made = Console(stderr=stderr, file=file, markup=False, emoji=False, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _WIDE
    return made


def visible(text: str) -> str:
    """A text in which control characters, and those that turn the direction of writing, are spelt.

    A terminal would obey them, and a manifest or a name that an error quotes may have them. Spaces of every kind stay.
    """
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def say(line: str, *, to: Console | None = None, style: str | None = None) -> None:
    """Print a line to standard output, or elsewhere, whole: a terminal breaks it, so that it is copied in one piece."""
    from rich.text import Text

    (to or terminal()).print(Text(visible(line), style=style or ""), soft_wrap=True)


def progress(to: Console) -> Progress:
    """A bar for each thing that is counted, with its description and the time that is left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    description = TextColumn("{task.description}", markup=False)
    return Progress(description, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=to)


@contextmanager
def waiting(to: Console, title: str) -> Iterator[Waiting]:
    """A spinner with a title, while something goes on."""
    from rich.text import Text

    with to.status(Text(title)) as status:
        yield Waiting(status)


class Waiting:
    """A spinner whose title changes."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def update(self, title: str) -> None:
        """Show another title."""
        from rich.text import Text

        self._status.update(Text(title))
