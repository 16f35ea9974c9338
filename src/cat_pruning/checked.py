"""Arguments of the public functions are of the types that their signatures say, or refused at once."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, Final, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cat_pruning.errors import SettingsError

_Function = TypeVar("_Function", bound=Callable[..., Any])

_LONGEST: Final = 60  # characters of a value in a message


def checked(function: _Function) -> _Function:
    """`function`, which refuses arguments of other types than it is annotated with; the others it gets as they came.

    Types are pydantic's, strictly: no text stands for a number, and no bool.

    Raises:
        SettingsError: from the function: an argument is of another type; its name, and what was expected.
    """
    signature = inspect.signature(function)

    @functools.cache
    def types() -> dict[str, TypeAdapter[Any]]:
        config = ConfigDict(arbitrary_types_allowed=True)
        hints = typing.get_type_hints(function, include_extras=True)
        return {name: TypeAdapter(hints[name], config=config) for name in signature.parameters if name in hints}

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        for name, value in signature.bind(*arguments, **named).arguments.items():
            if name in types():
                _check(name, value, types()[name])
        return function(*arguments, **named)

    return call  # type: ignore[return-value]  # of the same signature


def _check(name: str, value: object, kind: TypeAdapter[Any]) -> None:
    try:
        kind.validate_python(value, strict=True)
    except ValidationError as error:
        expected = error.errors(include_url=False)[0]["msg"].removeprefix("Input should be ")
        raise SettingsError(f"{name}={shown(value)}: expected {expected}") from None


def shown(value: object) -> str:
    """A value in a message, in one line and not long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
