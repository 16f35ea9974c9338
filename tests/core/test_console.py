from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from cat_pruning.console import collector_paused


@pytest.fixture
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_thawed")
def test_the_collector_rests_while_libraries_load() -> None:
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
