"""TensorRT is looked for anew by each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cat_pruning.engines.tensorrt_library import tensorrt_library


@pytest.fixture(autouse=True)
def _fresh_libraries() -> Iterator[None]:
    tensorrt_library.cache_clear()
    yield
    tensorrt_library.cache_clear()
