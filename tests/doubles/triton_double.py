"""What stands in for Triton Inference Server: its Python module, and a server of a model repository.

The module has of `triton_python_backend_utils` what its documentation says of requests, tensors, responses and errors.
The server holds every request and response against the model's configuration, as Triton does: names, types, shapes,
the largest batch, one response to each request.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# Triton's types of tensors, as numpy has them; texts are objects.
DTYPES: Mapping[str, Any] = {
    "TYPE_STRING": np.object_,
    "TYPE_UINT8": np.uint8,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP32": np.float32,
}
Array = np.ndarray[Any, Any]


class Tensor:
    """A named array."""

    def __init__(self, name: str, numpy_array: Array) -> None:
        self._name, self._array = name, numpy_array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        return self._array


class TritonError:
    """An error of one request."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceRequest:
    """A request, which its client may cancel."""

    def __init__(self, inputs: Sequence[Tensor], request_id: str = "") -> None:
        self._inputs, self._id = list(inputs), request_id
        self.cancelled = False

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._id

    def is_cancelled(self) -> bool:
        return self.cancelled


class InferenceResponse:
    """Tensors, or an error."""

    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        assert type(output_tensors) is list
        self._outputs, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Triton:
    """A model that is served; `config` is its ModelConfig in JSON's form, with the protobuf's own names."""

    def __init__(self, model: Any, config: Mapping[str, Any]) -> None:
        self._model, self._config = model, config

    def infer(self, *requests: InferenceRequest) -> list[InferenceResponse]:
        """What becomes of requests that Triton has batched."""
        assert sum(self._rows(request) for request in requests) <= self._config["max_batch_size"]
        responses: list[InferenceResponse] = self._model.execute(list(requests))
        assert len(responses) == len(requests)
        for request, response in zip(requests, responses, strict=True):
            if not response.has_error():
                self._check_outputs(self._rows(request), response)
        return responses

    def _rows(self, request: InferenceRequest) -> int:
        known = {each["name"]: each for each in self._config["input"]}
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        assert given.keys() >= {name for name, each in known.items() if not each.get("optional")}
        for name, array in given.items():
            assert array.dtype == DTYPES[known[name]["data_type"]], name
            assert list(array.shape[1:]) == [int(each) for each in known[name]["dims"]], name
        (rows,) = {len(array) for array in given.values()}
        return rows

    def _check_outputs(self, rows: int, response: InferenceResponse) -> None:
        known = {each["name"]: each for each in self._config["output"]}
        given = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        assert given.keys() == known.keys()
        for name, array in given.items():
            assert array.dtype == DTYPES[known[name]["data_type"]], name
            dims = [int(each) for each in known[name]["dims"]]
            assert array.ndim == len(dims) + 1, name
            assert array.shape[0] == rows, name
            assert all(dim in (-1, size) for dim, size in zip(dims, array.shape[1:], strict=True)), name


@contextmanager
def served(repository: Path, name: str, config: Mapping[str, Any]) -> Iterator[Triton]:
    """A model of a repository, loaded from its model.py as Triton's stub process loads it, on a processor."""
    backend = ModuleType("triton_python_backend_utils")
    for each in (Tensor, TritonError, InferenceRequest, InferenceResponse):
        setattr(backend, each.__name__, each)
    spec = importlib.util.spec_from_file_location("model", repository / name / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[backend.__name__] = backend
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[backend.__name__]
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps(config),
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_repository": str(repository / name),
            "model_version": "1",
            "model_name": name,
        }
    )
    try:
        yield Triton(model, config)
    finally:
        model.finalize()
