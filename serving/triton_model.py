"""A bundle in Triton Inference Server's Python backend: requests of tensors in, images out, by the same `Service`.

`cat-serve --export-triton` writes the model.py that uses this. Triton's own module, `triton_python_backend_utils`,
exists in Triton's processes only, and is given to `Model`.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import ValidationError

from cat_pruning.serving.config import ServeConfig
from cat_pruning.serving.failures import RequestError
from cat_pruning.serving.orders import Done
from cat_pruning.serving.requests import ImageRequest
from cat_pruning.serving.service import Service

# The inputs beside the prompt, as the API calls them: each has one value for every row of a request, or is left out.
OPTIONAL: Final[dict[str, str]] = {
    "negative_prompt": "TYPE_STRING",
    "size": "TYPE_STRING",
    "num_inference_steps": "TYPE_INT32",
    "guidance_scale": "TYPE_FP32",
    "seed": "TYPE_INT64",
    "preset": "TYPE_STRING",
    "speedup": "TYPE_FP32",
}
PUBLIC_KEY: Final = "public_key.pem"  # in the model's directory, where the bundle must be signed
KINDS: Final = ("full", "pruned", "forecast")  # of the output `steps`
_POLL_S: Final = 0.1  # how often a client is asked whether it still waits


@dataclass(frozen=True, slots=True)
class _Refused:
    """An answer without images: a message, and the name of one of `TritonError`'s codes."""

    message: str
    code: str


class Model:
    """What model.py's `TritonPythonModel` does.

    Args:
        arguments: what Triton gives `initialize`.
        backend: the module `triton_python_backend_utils`.

    Raises:
        CatError: the bundle cannot be loaded.
    """

    def __init__(self, arguments: dict[str, str], backend: Any) -> None:
        self._backend = backend
        _choose_gpu(arguments)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cat-triton-events", daemon=True)
        self._thread.start()
        self._service = Service(config_of(arguments))
        self._service.start()
        asyncio.run_coroutine_threadsafe(self._service.ready(), self._loop).result()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request, in order. All of them are computed together, as far as they fit one batch."""
        rows = [self._submitted(request) for request in requests]
        pending = {each: request for request, row in zip(requests, rows, strict=True) for each in row}
        while pending:
            wait(pending, _POLL_S)
            pending = {each: request for each, request in pending.items() if not each.done()}
            for each, request in pending.items():
                if request.is_cancelled():
                    each.cancel()
        return [self._response([_outcome(each) for each in row]) for row in rows]

    def close(self) -> None:
        """Stop: the step in progress ends."""
        self._service.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submitted(self, request: Any) -> list[Future[list[Done]]]:
        """A request's rows, each an image; what is wrong with one is in its future."""
        inputs = {tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs()}
        fields = [_fields(inputs, row) for row in range(len(inputs["prompt"]))]
        return [asyncio.run_coroutine_threadsafe(self._image(each, request), self._loop) for each in fields]

    async def _image(self, fields: dict[str, Any], request: Any) -> list[Done]:
        return await self._service.generate(ImageRequest.model_validate(fields), request.request_id() or "triton")

    def _response(self, outcomes: Sequence[Done | _Refused]) -> Any:
        backend = self._backend
        refused = next((each for each in outcomes if isinstance(each, _Refused)), None)
        if refused is None and len({each.image.size for each in outcomes if isinstance(each, Done)}) > 1:
            refused = _Refused(
                "the images of one request have several sizes; ask for each size by itself", "INVALID_ARG"
            )
        if refused is not None:
            code = getattr(backend.TritonError, refused.code)
            return backend.InferenceResponse(output_tensors=[], error=backend.TritonError(refused.message, code))
        done = [each for each in outcomes if isinstance(each, Done)]
        steps = [[each.batch.steps.get(kind, 0) for kind in KINDS] for each in done]
        outputs = {
            "image": np.stack([np.asarray(each.image.convert("RGB"), np.uint8) for each in done]),  # (b, H, W, 3)
            "seed": np.array([[each.seed] for each in done], np.int64),  # (b, 1)
            "steps": np.array(steps, np.int32),  # (b, 3)
        }
        return backend.InferenceResponse(output_tensors=[backend.Tensor(*output) for output in outputs.items()])


def config_of(arguments: dict[str, str]) -> ServeConfig:
    """The configuration that config.pbtxt's parameters give; a relative bundle is in the model's directory."""
    parameters = {
        name: value["string_value"] for name, value in json.loads(arguments["model_config"])["parameters"].items()
    }
    directory = Path(arguments["model_repository"])
    return ServeConfig(
        bundles=(directory / parameters["bundle"],),
        engine=parameters["engine"],
        public_key=directory / PUBLIC_KEY if parameters["public_key"] else None,
        max_batch=int(parameters["max_batch"]),
        queue=max(64, int(parameters["max_batch"])),
        timeout_s=float(parameters["timeout_s"]),
        max_steps=int(parameters["max_steps"]),
        max_prompt_chars=int(parameters["max_prompt_chars"]),
        prompt_cache_mb=int(parameters["prompt_cache_mb"]),
        max_pixels=int(parameters["max_pixels"]) if parameters["max_pixels"] else None,
    )


def _choose_gpu(arguments: dict[str, str]) -> None:
    """Let this process see the GPU of its instance alone; CUDA has not been asked for one yet."""
    if arguments["model_instance_kind"] == "GPU":
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        number = int(arguments["model_instance_device_id"])
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[number] if seen else str(number)


def _fields(inputs: dict[str, np.ndarray[Any, Any]], row: int) -> dict[str, Any]:
    """A row as a request of one image; texts come as bytes."""
    values = {name: inputs[name][row] for name in ("prompt", *OPTIONAL) if name in inputs}
    return {
        name: value.decode("utf-8", "replace") if isinstance(value, bytes) else value.item()
        for name, value in values.items()
        if value != b""  # a text that says nothing, where other rows have one
    }


def _outcome(image: Future[list[Done]]) -> Done | _Refused:
    try:
        (done,) = image.result()
        return done
    except CancelledError:
        return _Refused("the client has cancelled the request", "CANCELLED")
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        said = str(first["msg"]).removeprefix("Value error, ")
        return _Refused(f"{name}: {said}" if name else said, "INVALID_ARG")
    except RequestError as error:
        return _Refused(str(error), _code(error.status))


def _code(status: HTTPStatus) -> str:
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT):
        return "UNAVAILABLE"
    return "INVALID_ARG" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "INTERNAL"
