from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import SD3Transformer2DModel

from cat_pruning.dtype import DType
from cat_pruning.engines.manifest import Source
from cat_pruning.errors import CheckpointError
from cat_pruning.exporter.checkpoint import find_checkpoint, load_transformer, random_transformer
from cat_pruning.models import miniatures

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_packaged_name() -> None:
    checkpoint = find_checkpoint("sd3-mini")
    assert checkpoint.source == Source(kind="packaged", location="sd3-mini")
    assert checkpoint.family.name == "sd3"
    assert checkpoint.directory == miniatures()["sd3-mini"]
    assert "vae" in checkpoint.components
    assert "text_encoder_3" not in checkpoint.components  # null in its model_index.json
    transformer = load_transformer(checkpoint.source, DType.FP32)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == checkpoint.num_parameters


def test_a_local_directory(tiny_checkpoint: Path, make_tiny_sd3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    checkpoint = find_checkpoint(tiny_checkpoint.name)
    assert checkpoint.source == Source(kind="directory", location=str(tiny_checkpoint))  # absolute: others load it
    assert (checkpoint.pixels_per_latent, checkpoint.default_resolution) == (4, 64)
    assert checkpoint.text_length == 13 + 256
    assert set(checkpoint.components) == {"transformer", "vae"}
    transformer = load_transformer(checkpoint.source, DType.FP32)
    assert not transformer.training
    assert same_weights(transformer, make_tiny_sd3())


def test_an_old_config_gets_what_it_leaves_out_and_loses_what_is_unknown(tiny_checkpoint: Path) -> None:
    path = tiny_checkpoint / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"qk_norm": null', '"of_the_future": 1'))
    config = find_checkpoint(str(tiny_checkpoint)).config
    assert config["qk_norm"] is None
    assert "of_the_future" not in config
    assert not [key for key in config if key.startswith("_")]


@pytest.mark.parametrize("dtype", list(DType))
def test_weights_are_loaded_in_the_dtype(tiny_checkpoint: Path, make_tiny_sd3: Any, dtype: DType) -> None:
    transformer = load_transformer(Source(kind="directory", location=str(tiny_checkpoint)), dtype)
    assert {parameter.dtype for parameter in transformer.parameters()} == {dtype.torch}
    assert same_weights(transformer, make_tiny_sd3().to(dtype.torch))


@pytest.mark.parametrize(("model", "hub_id"), [("some/sd3", "some/sd3"), ("sd3", None)])
def test_a_snapshot_of_the_hub(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, hub_id: str | None
) -> None:
    asked: list[tuple[str, str | None]] = []
    snapshot = Path(shutil.copytree(tiny_checkpoint, tmp_path / "snapshots" / COMMIT))

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: Any) -> str:
        asked.append((repo_id, revision))
        assert {"model_index.json", "transformer/*", "vae/config.json"} <= set(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = find_checkpoint(model, revision="v2")
    hub_id = hub_id or checkpoint.family.hub_id
    assert checkpoint.source == Source(kind="hub", location=hub_id, revision=COMMIT)  # not the branch, which moves
    load_transformer(checkpoint.source, DType.FP32)
    assert asked == [(hub_id, "v2"), (hub_id, COMMIT)]


def test_random_weights_of_the_published_architecture_need_no_memory_to_be_found() -> None:
    checkpoint = find_checkpoint("sd3", random_weights=True)
    assert checkpoint.source == Source(kind="random", location="sd3", seed=0)
    assert checkpoint.directory is None
    assert checkpoint.num_parameters == pytest.approx(2.03e9, rel=0.03)
    assert (checkpoint.default_resolution, checkpoint.text_length) == (1024, 333)


def test_random_weights_are_the_same_for_the_same_seed_and_normal(make_tiny_sd3: Any) -> None:
    config = dict(make_tiny_sd3().config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    one, same, other = (random_transformer("SD3Transformer2DModel", config, DType.FP32, seed) for seed in (0, 0, 1))
    assert same_weights(one, same)
    assert not same_weights(one, other)
    values = torch.cat([parameter.flatten() for parameter in one.parameters()])
    assert values.mean().item() == pytest.approx(0.0, abs=3e-4)
    assert values.std().item() == pytest.approx(0.02, rel=0.01)
    assert values.abs().max() > 0.06
    matrices = [parameter.flatten()[:16] for parameter in one.parameters()]
    assert len({tuple(values.tolist()) for values in matrices}) == len(matrices)  # a generator for each


@pytest.mark.parametrize("dtype", list(DType))
def test_random_weights_have_a_real_position_table(make_tiny_sd3: Any, dtype: DType) -> None:
    real = make_tiny_sd3()
    config = {key: value for key, value in real.config.items() if not key.startswith("_")}
    transformer = random_transformer("SD3Transformer2DModel", config, dtype, 0)
    assert isinstance(transformer, SD3Transformer2DModel)
    assert {tensor.dtype for tensor in transformer.state_dict().values()} == {dtype.torch}
    assert torch.equal(transformer.pos_embed.pos_embed, real.pos_embed.pos_embed.to(dtype.torch))


def test_a_checkpoint_that_has_gone(tiny_checkpoint: Path) -> None:
    source = find_checkpoint(str(tiny_checkpoint)).source
    shutil.rmtree(tiny_checkpoint)
    with pytest.raises(CheckpointError, match=r"tiny-pipeline is not there any more"):
        load_transformer(source, DType.FP32)
