"""What a check of this machine finds, whatever it fails with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cat_pruning.errors import CatError

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what was looked at; the same on every machine.
        status: "ok"; "warning", missing or limited, which may not matter; "problem", does not work here.
        text: what was found.
        remedy: what to install or to run; empty where there is nothing to do.
    """

    topic: str
    status: Status
    text: str
    remedy: str = ""


def isolated(
    topic: str, check: Callable[..., Finding], *arguments: Any, remedy: str = "", missing: Status = "problem"
) -> Finding:
    """What `check` finds, or what it fails with.

    Args:
        topic: of the finding, if it fails.
        check: looks at one thing, and imports what it looks at by itself.
        arguments: for the check.
        remedy: for errors that name none.
        missing: the status if a module is not installed; of those that one can do without, a warning.
    """
    try:
        return check(*arguments)
    except Exception as error:  # noqa: BLE001  # a broken library may raise whatever it likes
        text, told = f"{type(error).__name__}: {error}", ""
        if isinstance(error, CatError):
            text, told = error.problem, error.remedy
        for cause in _causes(error):
            if isinstance(cause, ModuleNotFoundError) and cause.name:
                return Finding(topic, missing, f"{cause.name} is not installed", told or f"pip install {cause.name}")
        return Finding(topic, "problem", " ".join(text.split()), told or remedy)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
