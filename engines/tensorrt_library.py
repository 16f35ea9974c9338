"""TensorRT and TensorRT-RTX: one API under two names, imported here and nowhere else.

Everything that either is asked goes through the module that `tensorrt_library` returns. What it has to say comes
through one log per module, because both refuse a second logger in a process; `Log.collected` gathers the errors of one
call, which the API itself reports as False or None.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from cat_pruning.errors import EngineError
from cat_pruning.names import TITLES, Flavour, install_command

logger = logging.getLogger(__name__)

OLDEST_TENSORRT: Final = (10, 15)  # the first that prefers our plugin over the function body where a node asks for it


@functools.cache
def tensorrt_library(flavour: Flavour) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`.

    Raises:
        EngineError: it is not installed, is broken, or is older than `OLDEST_TENSORRT`.
    """
    remedy = install_command(flavour)
    try:
        module = importlib.import_module(flavour)
    except (ImportError, OSError, RuntimeError) as error:  # OSError: one of its own libraries is missing
        raise EngineError(f"{TITLES[flavour]} cannot be imported here ({error})", remedy) from error
    if flavour == "tensorrt" and _version_numbers(module.__version__) < OLDEST_TENSORRT:
        oldest = ".".join(map(str, OLDEST_TENSORRT))
        raise EngineError(f"TensorRT {module.__version__} is too old, expected {oldest} or newer", remedy)
    return module


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


class Log:
    """What a TensorRT has said; `handle` is the `ILogger` to pass it."""

    def __init__(self, module: Any) -> None:
        self._lines = threading.local()
        self.handle = _logger_class(module)(self._log)

    @contextmanager
    def collected(self) -> Iterator[list[str]]:
        """The errors that this thread's calls report meanwhile, oldest first."""
        before = getattr(self._lines, "errors", None)
        errors: list[str] = []
        self._lines.errors = errors
        try:
            yield errors
        finally:
            self._lines.errors = before

    def _log(self, level: int, message: str) -> None:
        logger.log(level, message)
        errors = getattr(self._lines, "errors", None)
        if level >= logging.ERROR and errors is not None:
            errors.append(message)


@functools.cache
def library_log(module: Any) -> Log:
    """The one log of a module."""
    return Log(module)


def first_error(errors: list[str], otherwise: str) -> str:
    """The first of the errors, which the later ones follow from, in one line."""
    return " ".join((errors[0] if errors else otherwise).split())[:400]


def _logger_class(module: Any) -> Any:
    severity = module.ILogger.Severity
    # A library reports on itself at INFO; here that is debugging output.
    levels = {
        severity.INTERNAL_ERROR: logging.CRITICAL,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
    }

    class Logger(module.ILogger):  # type: ignore[misc]  # from an untyped module
        def __init__(self, say: Any) -> None:
            module.ILogger.__init__(self)  # super() does not reach what is bound from C++
            self._say = say

        def log(self, severity: Any, message: str) -> None:
            self._say(levels.get(severity, logging.DEBUG), message)

    return Logger
