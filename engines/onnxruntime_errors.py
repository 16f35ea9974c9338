"""What ONNX Runtime raises: its exceptions share no base but Exception, and those of its C API are listed nowhere."""

from __future__ import annotations

import onnxruntime


def _errors() -> tuple[type[Exception], ...]:
    state = onnxruntime.capi.onnxruntime_pybind11_state
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return (RuntimeError, *(getattr(state, name) for name in names if hasattr(state, name)))


ORT_ERRORS = _errors()
