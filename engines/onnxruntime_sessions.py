"""Sessions of ONNX Runtime that print nothing, and what they raise.

ONNX Runtime writes an error to the standard error, in red, before it raises an exception that says the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnxruntime

_FATAL: Final = 4  # and nothing below


def _errors() -> tuple[type[Exception], ...]:
    """Its exceptions share no base but Exception, and are listed nowhere."""
    found = vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
    return (RuntimeError, *(each for each in found if isinstance(each, type) and issubclass(each, Exception)))


ORT_ERRORS: Final = _errors()


def quiet_session(
    graph: Path | bytes,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    options: onnxruntime.SessionOptions | None = None,
    **more: Any,
) -> onnxruntime.InferenceSession:
    """A session of a graph, without a line of its own whatever goes wrong.

    Args:
        graph: its file, or its bytes.
        providers: as ONNX Runtime takes them.
        options: of the session; changed.
        more: for `onnxruntime.InferenceSession`.

    Raises:
        Exception: one of `ORT_ERRORS`.
    """
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    return onnxruntime.InferenceSession(graph, options, providers=[*providers], **more)


def quiet_run_options() -> onnxruntime.RunOptions:
    """Options for a session's runs, which have a severity of their own."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = _FATAL
    return options


def run_quietly(session: onnxruntime.InferenceSession, inputs: Mapping[str, Any]) -> list[Any]:
    """All outputs of a session, in its order."""
    results: list[Any] = session.run(None, dict(inputs), quiet_run_options())
    return results
