"""Which names of a library of Python bindings are used while something runs: "Builder.create_network"."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class Recorded:
    """An enumeration, or an object that is played, whose attributes are told when they are asked for."""

    def __init__(self, real: Any, of: str, used: set[str]) -> None:
        self._real, self._of, self._used = real, of, used

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        self._used.add(f"{self._of}.{name}")
        return value


def record(module: ModuleType, used: set[str], patch: pytest.MonkeyPatch) -> None:
    """Record the methods, properties and members of enumerations of all that `module` has, from now on."""
    for of, each in list(vars(module).items()):
        if hasattr(each, "__members__") or isinstance(each, SimpleNamespace):
            patch.setattr(module, of, Recorded(each, of, used))
            continue
        if not isinstance(each, type):
            continue
        for name, value in list(vars(each).items()):
            if name.startswith("_"):
                continue
            if type(value) is property:
                patch.setattr(each, name, _property(value, f"{each.__name__}.{name}", used))
            elif callable(value) and not isinstance(value, type | staticmethod | property):
                patch.setattr(each, name, _method(value, f"{each.__name__}.{name}", used))
    return used


def _method(real: Callable[..., Any], name: str, used: set[str]) -> Callable[..., Any]:
    @functools.wraps(real)
    def method(*arguments: Any, **options: Any) -> Any:
        used.add(name)
        return real(*arguments, **options)

    return method


def _property(real: property, name: str, used: set[str]) -> property:
    def get(this: Any) -> Any:
        used.add(name)
        return real.__get__(this)

    def put(this: Any, value: Any) -> None:
        used.add(name)
        real.__set__(this, value)

    return property(get, put)
