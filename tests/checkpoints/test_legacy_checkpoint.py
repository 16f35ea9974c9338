"""Checkpoints as the hub has them, where their names are older than today's classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_pruning.checkpoints.checkpoint import find_checkpoint, load_transformer
from cat_pruning.dtype import DType
from cat_pruning.errors import CheckpointError
from cat_pruning.models import miniatures


@pytest.fixture
def pixart_sigma(tmp_path: Path, make_tiny: Callable[[str], Any]) -> Path:
    """A pipeline of PixArt-Σ as its authors uploaded it: the transformer goes by its former class."""
    root = tmp_path / "pixart"
    make_tiny("pixart").save_pretrained(root / "transformer")
    config = json.loads((root / "transformer" / "config.json").read_text())
    (root / "transformer" / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    mini = miniatures()["pixart-mini"]
    index = json.loads((mini / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (root / "model_index.json").write_text(json.dumps(index))
    for name in ("vae/config.json", "tokenizer/tokenizer_config.json"):
        (root / name).parent.mkdir()
        (root / name).write_bytes((mini / name).read_bytes())
    return root


def test_pixart_under_its_former_class_is_recognised_and_loaded(pixart_sigma: Path, make_tiny: Any) -> None:
    checkpoint = find_checkpoint(str(pixart_sigma))
    assert checkpoint.family.name == "pixart"
    loaded = load_transformer(checkpoint.source, DType.FP32)
    assert type(loaded).__name__ == "PixArtTransformer2DModel"
    for mine, theirs in zip(loaded.parameters(), make_tiny("pixart").parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_other_models_of_the_former_class_are_refused(pixart_sigma: Path) -> None:
    path = pixart_sigma / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_type": "ada_norm_zero"}))  # DiT
    with pytest.raises(CheckpointError, match="class Transformer2DModel is not supported"):
        find_checkpoint(str(pixart_sigma))


def test_text_rows_are_no_more_than_the_tokenizer_makes(pixart_sigma: Path) -> None:
    assert find_checkpoint(str(pixart_sigma)).text_length == 24
    path = pixart_sigma / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": 512}))  # T5's own
    assert find_checkpoint(str(pixart_sigma)).text_length == 300
