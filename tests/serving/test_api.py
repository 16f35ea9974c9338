from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from serving_server import PROMPT, SMALL, Server

from cat_pruning.serving.model import ServedModel
from cat_pruning.settings import PruneSettings


def picture(encoded: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    image.load()
    return image


def pixels(encoded: str) -> NDArray[np.int16]:
    return np.asarray(picture(encoded).convert("RGB")).astype(np.int16)


def events(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n") for block in response.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


@pytest.fixture(scope="module")
def direct(served_bundle: Path) -> Callable[..., NDArray[np.int16]]:
    """The picture of a pipeline that nothing is served by."""
    import cat_pruning

    pipe = cat_pruning.load_pipeline(served_bundle, "onnxruntime")
    pipe.set_progress_bar_config(disable=True)

    def run(seed: int, settings: PruneSettings | None = None, **changed: Any) -> NDArray[np.int16]:
        pipe.transformer.settings = settings or PruneSettings()
        arguments = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 3.0} | changed
        generator = torch.Generator().manual_seed(seed)
        image = pipe(PROMPT, generator=generator, max_sequence_length=24, **arguments).images[0]
        return np.asarray(image).astype(np.int16)

    return run


def test_the_official_client_generates_images_unchanged(
    server: Server, direct: Callable[..., NDArray[np.int16]]
) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.images.generate(
            model="sd3-mini", prompt=PROMPT, n=2, size="64x64", extra_body={"num_inference_steps": 3, "seed": 7}
        )
        assert [model.id for model in client.models.list()] == ["sd3-mini"]
        with pytest.raises(openai.NotFoundError, match="no such model; there are sd3-mini"):
            client.images.generate(model="dall-e-3", prompt=PROMPT)
        previews = client.images.generate(
            prompt=PROMPT, size="64x64", stream=True, partial_images=2, extra_body={"num_inference_steps": 3, "seed": 7}
        )
        streamed = list(previews)
    assert answer.data is not None
    assert [datum.seed for datum in answer.data] == [7, 8]  # type: ignore[attr-defined]
    changed = {"guidance_scale": server.service.models["sd3-mini"].default_guidance}
    for datum, seed in zip(answer.data, (7, 8), strict=True):
        assert np.array_equal(pixels(datum.b64_json or ""), direct(seed, **changed))
    assert [event.type for event in streamed] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert np.array_equal(pixels(streamed[-1].b64_json), direct(7, **changed))


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({"preset": "forecast"}, PruneSettings.preset("forecast")),
        ({"preset": "paper"}, PruneSettings()),
        ({"speedup": 1}, PruneSettings(full_steps=12)),
        ({"speedup": 2}, None),
    ],
    ids=["forecast", "paper", "full", "tuned"],
)
def test_settings_of_a_request_are_those_of_a_direct_run(
    server: Server,
    direct: Callable[..., NDArray[np.int16]],
    loaded: ServedModel,
    asked: dict[str, Any],
    settings: PruneSettings | None,
) -> None:
    (schedule,) = loaded._schedules.values()
    answer = server.post(**asked, num_inference_steps=6).json()
    expected = direct(7, settings or PruneSettings.tuned(schedule), num_inference_steps=6)
    assert np.array_equal(pixels(answer["data"][0]["b64_json"]), expected)
    assert sum(answer["steps"].values()) == 6
    assert answer["steps"]["full"] == {"forecast": 5, "paper": 6}.get(asked.get("preset", ""), answer["steps"]["full"])


def test_images_of_one_batch_are_those_of_single_requests(serve: Callable[..., Any], server: Server) -> None:
    """To a grey value of 255: a batch's matrices have other shapes, and so other roundings."""
    prompts = [PROMPT, "a small green triangle left of a large white square on a plain blue background"]
    with serve(max_batch=4) as batched:
        together = batched.post(prompt=prompts, n=2, speedup=1, seed=5).json()["data"]
        assert batched.metric("cat_batch_images_sum") == 4
        assert batched.metric("cat_batch_images_count") == 1
    assert [datum["seed"] for datum in together] == [5, 6, 7, 8]
    for datum, prompt in zip(together, [prompts[0]] * 2 + [prompts[1]] * 2, strict=True):
        alone = server.post(prompt=prompt, speedup=1, seed=datum["seed"]).json()["data"][0]
        assert np.abs(pixels(datum["b64_json"]) - pixels(alone["b64_json"])).max() <= 1


def test_previews_come_nearer_to_the_picture(server: Server) -> None:
    response = server.post(stream=True, partial_images=3, num_inference_steps=8, speedup=1, token_map=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *partial, (last, completed) = events(response)
    assert [name for name, _ in partial] == ["image_generation.partial_image"] * 3
    assert [(fields["partial_image_index"], fields["step"], fields["num_steps"]) for _, fields in partial] == [
        (0, 2, 8),
        (1, 4, 8),
        (2, 6, 8),
    ]
    assert last == "image_generation.completed"
    final = pixels(completed["b64_json"])
    errors = [float(np.square(pixels(fields["b64_json"]) - final).mean()) for _, fields in partial]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5 * errors[0]
    assert completed["steps"] == {"full": 8, "pruned": 0, "forecast": 0}
    assert completed["seed"] == 7
    assert np.asarray(picture(completed["token_map"])).min() == 255  # every token on every step


@pytest.mark.parametrize(("output_format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(server: Server, output_format: str, kind: str) -> None:
    answer = server.post(output_format=output_format, preset="forecast").json()
    assert (answer["output_format"], answer["size"]) == (output_format, "64x64")
    image = picture(answer["data"][0]["b64_json"])
    assert (image.format, image.size) == (kind, (64, 64))


def test_compression_is_a_quality(server: Server) -> None:
    sizes = [
        len(server.post(output_format="jpeg", output_compression=quality).json()["data"][0]["b64_json"])
        for quality in (5, 100)
    ]
    assert sizes[0] < sizes[1]


def test_a_token_map_shows_what_was_pruned(server: Server) -> None:
    answer = server.post(preset="paper", num_inference_steps=12, token_map=True).json()
    assert answer["steps"] == {"full": 8, "pruned": 4, "forecast": 0}
    grey = np.asarray(picture(answer["data"][0]["token_map"]))
    assert grey.min() < 255
    share = (grey / 255 * 12 - 8).mean() / 4  # of the tokens, on the pruned steps
    assert share == pytest.approx(19 / 64, abs=0.02)


def test_a_prompt_is_encoded_once(server: Server, loaded: ServedModel) -> None:
    encoded: list[int] = []
    hook = loaded._pipe.text_encoder.text_model.register_forward_hook(lambda *_: encoded.append(1))
    body = {"size": "64x64", "num_inference_steps": 2}
    try:
        answers = [
            server.client.post("/v1/images/generations", json=body | {"prompt": prompt, "seed": seed})
            for prompt, seed in (("a red cross", 1), ("a red cross", 2), ("a red cross", 1), ("a red ring", 1))
        ]
    finally:
        hook.remove()
    first, other, again, ring = (answer.json()["data"][0]["b64_json"] for answer in answers)
    assert first == again
    assert len({first, other, ring}) == 3
    assert len(encoded) in (2, 3)  # two prompts, and the empty one unless it was there already


def test_a_request_that_names_no_seed_is_told_it(server: Server) -> None:
    first, second = (server.post(seed=None).json()["data"][0]["seed"] for _ in range(2))
    assert first != second
    again = [server.post(seed=first).json()["data"][0]["b64_json"] for _ in range(2)]
    assert again[0] == again[1]


def test_a_negative_prompt_is_obeyed(server: Server) -> None:
    plain, negative = (server.post(negative_prompt=text).json()["data"][0]["b64_json"] for text in ("", "a red circle"))
    assert plain == server.post().json()["data"][0]["b64_json"]
    assert plain != negative


def test_timings_add_up(server: Server) -> None:
    timings = server.post().json()["timings"]
    parts = sum(timings[name] for name in ("queue_ms", "encode_ms", "steps_ms", "decode_ms"))
    assert 0.5 * timings["total_ms"] < parts <= timings["total_ms"]


def test_models_say_what_they_can_be_asked_for(server: Server) -> None:
    (model,) = server.client.get("/v1/models").json()["data"]
    assert model["id"] == "sd3-mini"
    assert model["sizes"] == ["128x128"]
    assert model["default_steps"] == 28
    assert model["presets"] == ["paper", "refreshed", "forecast"]
    assert model["speedups"] == [1.0, 2.0]


def test_health_and_metrics(server: Server) -> None:
    before = server.metric("cat_requests_total", outcome="done")
    full = server.metric("cat_steps_total", kind="full")
    server.post()
    assert server.metric("cat_requests_total", outcome="done") == before + 1
    assert server.metric("cat_steps_total", kind="full") == full + 3
    assert server.client.get("/health/live").json() == {"status": "live"}
    assert server.client.get("/health/ready").json() == {"status": "ready"}
    text = server.client.get("/metrics").text
    for name in ("cat_queue_seconds_bucket", 'cat_stage_seconds_count{stage="decode"}', "cat_session_bytes"):
        assert name in text
    assert server.client.get("/docs").status_code == 200
    assert SMALL["prompt"] not in text
