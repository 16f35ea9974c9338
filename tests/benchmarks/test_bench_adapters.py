"""That what is measured is what the README says: every linear layer, loaded, switched and let go of."""

from __future__ import annotations

from pathlib import Path

import bench_adapters
import pytest

from cat_pruning import load_pipeline


@pytest.mark.long
def test_adapters(mini_bundle: Path) -> None:
    pytest.importorskip("peft")
    pipe = load_pipeline(mini_bundle, "onnxruntime")
    result = bench_adapters.measure(pipe, rounds=1)
    assert result["layers"] == 88
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert not pipe.get_list_adapters()
