"""The answers of the images API, in OpenAI's shapes, and what we add."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from cat_pruning.serving.orders import Done, Preview
from cat_pruning.serving.pictures import encoded, token_map
from cat_pruning.serving.requests import ImageRequest


class Timings(BaseModel):
    """Where the time went, in ms. Of several batches the longest wait, and the sums of the stages."""

    queue_ms: float
    encode_ms: float
    steps_ms: float
    decode_ms: float
    total_ms: float


class Datum(BaseModel):
    """One image."""

    b64_json: str = Field(description="The image's file in base64.")
    seed: int = Field(description="With which the same request gives this image again.")
    token_map: str | None = Field(None, description="A PNG in base64: white tokens were computed on every step.")


class Images(BaseModel):
    """The answer of `POST /v1/images/generations`."""

    created: int
    data: list[Datum]
    output_format: str
    size: str
    background: str = "opaque"
    quality: str = "auto"
    timings: Timings
    steps: dict[str, int] = Field(description="Steps of each image, by what they computed: full, pruned, forecast.")


class Problem(BaseModel):
    """What is wrong, and what to do."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """The answer to a request that is not answered otherwise."""

    error: Problem


class Model(BaseModel):
    """A bundle that is served."""

    id: str
    object: str
    created: int
    owned_by: str
    sizes: list[str] = Field(description="WIDTHxHEIGHT that it was exported for.")
    default_steps: int
    default_guidance: float
    presets: list[str]
    speedups: list[float] = Field(description="Of its schedules, for `default_steps` or others.")


class Models(BaseModel):
    """The answer of `GET /v1/models`."""

    object: str = "list"
    data: list[Model]


def datum(request: ImageRequest, done: Done) -> Datum:
    """One image; its file is made here, which takes milliseconds."""
    drawn = None
    if request.token_map:
        num_steps = sum(done.batch.steps.values())
        drawn = encoded(token_map(done.counts, done.grid, num_steps, done.image.size), "png")
    file = encoded(done.image, request.output_format, request.output_compression)
    return Datum(b64_json=file, seed=done.seed, token_map=drawn)


def images(request: ImageRequest, size: str, done: Sequence[Done], began: float) -> Images:
    """All images of a request. `began` is on the clock of `time.monotonic`."""
    data = [datum(request, each) for each in done]
    return Images(
        created=int(time.time()),
        data=data,
        output_format=request.output_format,
        size=size,
        timings=_timings(done, began),
        steps=_steps(done[0]),
    )


def completed_event(request: ImageRequest, size: str, done: Done, began: float) -> str:
    """An image's last server-sent event."""
    fields = datum(request, done).model_dump(exclude_none=True)
    fields |= {"timings": _timings([done], began).model_dump(), "steps": _steps(done), "index": done.index}
    return _image_event("image_generation.completed", request, size, fields)


def partial_event(request: ImageRequest, size: str, preview: Preview) -> str:
    """A preview's server-sent event."""
    fields: dict[str, Any] = {
        "b64_json": encoded(preview.image, request.output_format, request.output_compression),
        "partial_image_index": preview.number,
        "step": preview.step,
        "num_steps": preview.num_steps,
        "index": preview.index,
    }
    return _image_event("image_generation.partial_image", request, size, fields)


def event(name: str, fields: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(fields)}\n\n"


def _image_event(name: str, request: ImageRequest, size: str, fields: dict[str, Any]) -> str:
    common = {
        "type": name,
        "created_at": int(time.time()),
        "size": size,
        "output_format": request.output_format,
        "background": "opaque",
        "quality": "auto",
    }
    return event(name, common | fields)


def _timings(done: Sequence[Done], began: float) -> Timings:
    batches = {id(each.batch): each.batch for each in done}.values()
    return Timings(
        queue_ms=max(each.queue_ms for each in batches),
        encode_ms=sum(each.encode_ms for each in batches),
        steps_ms=sum(each.steps_ms for each in batches),
        decode_ms=sum(each.decode_ms for each in batches),
        total_ms=(time.monotonic() - began) * 1e3,
    )


def _steps(done: Done) -> dict[str, int]:
    return {"full": 0, "pruned": 0, "forecast": 0} | done.batch.steps
