from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cat_pruning.bundle.schema import Source
from cat_pruning.checkpoints.checkpoint import find_checkpoint, model_names
from cat_pruning.checkpoints.published import published_models
from cat_pruning.models import miniatures

# Parameters only: SD3's position tables, 0.06 to 0.2 billion numbers more in a checkpoint's file, are buffers.
NUM_PARAMETERS = {
    "flux-dev": 11_901_408_320,
    "flux-schnell": 11_891_178_560,
    "pixart-sigma": 610_856_096,
    "sd3": 2_028_328_000,
    "sd3.5-large": 8_056_627_520,
    "sd3.5-medium": 2_243_171_520,
}


def test_every_config_is_known_by_its_files_name() -> None:
    assert set(published_models()) == set(NUM_PARAMETERS)
    assert model_names() == sorted([*NUM_PARAMETERS, *miniatures()])


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_every_config_makes_the_module_of_its_class_without_weights(name: str) -> None:
    published = published_models()[name]
    assert published.hub_id.count("/") == 1
    checkpoint = find_checkpoint(name, random_weights=True)  # makes the module, on the meta device
    assert checkpoint.source == Source(kind="random", location=name, seed=0)
    assert checkpoint.directory is None
    assert checkpoint.components == ()
    assert checkpoint.family.name == re.split("[-.]", name)[0]
    assert checkpoint.num_parameters == NUM_PARAMETERS[name]
    assert checkpoint.default_resolution == 1024
    assert checkpoint.text_length == {"sd3": 77 + 256, "pixart": 300, "flux": 512}[checkpoint.family.name]
    # As JSON holds it, with what diffusers fills in.
    assert published.transformer.items() <= json.loads(json.dumps(checkpoint.family.config)).items()


def test_a_published_name_is_no_directory_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sd3").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("sd3", random_weights=True).source.kind == "random"
