"""A server's threads, as docs/serving.md has them."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs/serving.md"
REQUESTS = [("a red circle", 0), ("a very large blue star above a small green square", 1), ("a star", 2)]


@pytest.fixture(scope="module")
def server(mini_bundle: Path) -> dict[str, Any]:
    """What the page's program defines, over the stored bundle, with fewer steps."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (block,) = (each for each in blocks if "def handle" in each)
    program = block.replace("build/sd3-mini", str(mini_bundle)).replace(
        "num_inference_steps=28", "num_inference_steps=5"
    )
    names: dict[str, Any] = {}
    exec(program, names)
    return names


def test_threads_make_the_images_of_one(server: dict[str, Any]) -> None:
    barrier = threading.Barrier(len(REQUESTS))

    def at_once(request: tuple[str, int]) -> tuple[Any, Any]:
        barrier.wait()
        return server["handle"](*request), server["local"].pipe

    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        images, pipes = zip(*pool.map(at_once, REQUESTS), strict=True)
    for image, request in zip(images, REQUESTS, strict=True):
        expected = server["handle"](*request)
        np.testing.assert_allclose(np.asarray(image, np.int16), np.asarray(expected, np.int16), atol=1)
    for name in ("scheduler", "tokenizer", "tokenizer_2", "transformer"):
        parts = [getattr(pipe, name) for pipe in (server["pipe"], *pipes)]
        assert len(set(map(id, parts))) == len(parts), name
    assert len({id(pipe.tokenizer.backend_tokenizer) for pipe in pipes}) == len(pipes)


def test_copies_share_weights_and_no_settings(server: dict[str, Any]) -> None:
    pipe, copied = server["pipe"], server["copy_of"](server["pipe"])
    assert copied.transformer.engine is pipe.transformer.engine
    assert copied.text_encoder is pipe.text_encoder
    before = pipe.transformer.settings
    copied.transformer.settings = before.replace(full_steps=3)
    assert pipe.transformer.settings == before
