from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor

from cat_pruning import families
from cat_pruning.bundle.schema import Source
from cat_pruning.checkpoints.checkpoint import find_checkpoint, load_transformer
from cat_pruning.checkpoints.hub import pipeline_snapshot
from cat_pruning.checkpoints.published import published_models
from cat_pruning.checkpoints.variants import variant_of
from cat_pruning.dtype import DType
from cat_pruning.errors import CheckpointError
from cat_pruning.exporter.memory import held_bytes
from cat_pruning.families.family import MOST_TEXT
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
    transformer = load_transformer(checkpoint.source, DType.FP32)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == checkpoint.num_parameters


def test_a_local_directory(tiny_checkpoint: Path, make_tiny_sd3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    checkpoint = find_checkpoint(tiny_checkpoint.name)
    assert checkpoint.source == Source(kind="directory", location=str(tiny_checkpoint))  # absolute: others load it
    assert (checkpoint.pixels_per_latent, checkpoint.default_resolution) == (4, 64)
    assert checkpoint.text_length == 13 + 256
    assert {"transformer", "vae", "text_encoder", "scheduler"} < set(checkpoint.components)
    assert "text_encoder_3" not in checkpoint.components  # null in its model_index.json
    transformer = load_transformer(checkpoint.source, DType.FP32)
    assert not transformer.training
    assert same_weights(transformer, make_tiny_sd3())


@pytest.mark.parametrize(
    ("kind", "family", "text_length", "text_lengths"),
    [
        ("sd3", "sd3", 13 + 256, range(13 + 1, 13 + 513)),
        ("sd3.5", "sd3", 13 + 256, range(13 + 1, 13 + 513)),
        ("pixart", "pixart", 13, range(1, MOST_TEXT + 1)),
        ("flux-dev", "flux", 21, range(1, 513)),
    ],
)
def test_a_pipeline_of_every_family(
    write_checkpoint: Any,
    make_tiny: Any,
    tmp_path: Path,
    kind: str,
    family: str,
    text_length: int,
    text_lengths: range,
) -> None:
    checkpoint = find_checkpoint(str(write_checkpoint(tmp_path / "pipeline", kind)))
    assert checkpoint.family.name == family
    assert checkpoint.text_length == text_length
    assert checkpoint.text_lengths == text_lengths
    assert checkpoint.pixels_per_latent == 4
    assert checkpoint.default_resolution == (128 if family == "flux" else 16) * 4
    transformer = load_transformer(checkpoint.source, DType.FP32)
    assert type(transformer) is type(make_tiny(kind))
    assert same_weights(transformer, make_tiny(kind))


@pytest.mark.parametrize(("kind", "tokenizer", "text_length"), [("pixart", "tokenizer", 300),
                                                                ("flux-dev", "tokenizer_2", 512)])  # fmt: skip
def test_text_as_long_as_the_pipelines_default_where_the_tokenizer_has_more(
    write_checkpoint: Any, tmp_path: Path, kind: str, tokenizer: str, text_length: int
) -> None:
    directory = write_checkpoint(tmp_path / "pipeline", kind)
    (directory / tokenizer / "tokenizer_config.json").write_text('{"model_max_length": 4096}')
    assert find_checkpoint(str(directory)).text_length == text_length


@pytest.mark.parametrize(
    ("transformer_class", "message"),
    [
        ("AuraFlowTransformer2DModel", "AuraFlowTransformer2DModel alone, and no published pipeline has one: .* give"),
        ("OwnTransformer2DModel", r"diffusers \S+ has no class OwnTransformer2DModel; update diffusers; a class of"),
    ],
)
def test_a_family_of_ones_own_that_no_export_finds(
    write_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, transformer_class: str, message: str
) -> None:
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES])
    families.register(
        type("Own", (families.StableDiffusion3,), {"name": "own", "transformer_class": transformer_class})
    )
    directory = write_checkpoint(tmp_path / "pipeline", "sd3")
    if "alone" in message:
        directory = directory / "transformer"
        path, former = directory / "config.json", '"_class_name": "SD3Transformer2DModel"'
        renamed = f'"_class_name": "{transformer_class}"'
    else:
        path, former, renamed = directory / "model_index.json", '"SD3Transformer2DModel"', f'"{transformer_class}"'
    path.write_text(path.read_text().replace(former, renamed))
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(str(directory))


def test_a_transformer_alone(make_tiny: Any, kind: str, tmp_path: Path) -> None:
    transformer = make_tiny(kind)
    transformer.save_pretrained(tmp_path)
    checkpoint = find_checkpoint(str(tmp_path))
    assert checkpoint.source == Source(kind="directory", location=str(tmp_path))
    assert checkpoint.family.transformer_class == type(transformer).__name__
    assert checkpoint.components == ()
    assert checkpoint.pixels_per_latent == 8
    assert checkpoint.text_length == {"sd3": 333, "pixart": 300, "flux": 512}[checkpoint.family.name]
    assert same_weights(load_transformer(checkpoint.source, DType.FP32), transformer)


@pytest.mark.parametrize("index", [{}, {"_class_name": "DiTTransformer2DModel"}])
def test_a_model_alone_of_another_class(tmp_path: Path, index: dict[str, str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(index))
    name = index.get("_class_name")
    known = "SD3Transformer2DModel, PixArtTransformer2DModel, FluxTransformer2DModel"
    with pytest.raises(CheckpointError, match=f"class {name} is not supported; supported are {known}"):
        find_checkpoint(str(tmp_path))


def test_an_old_config_gets_what_it_leaves_out_and_loses_what_is_unknown(tiny_checkpoint: Path) -> None:
    path = tiny_checkpoint / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"qk_norm": null', '"of_the_future": 1'))
    config = find_checkpoint(str(tiny_checkpoint)).family.config
    assert config["qk_norm"] is None
    assert "of_the_future" not in config
    assert not [key for key in config if key.startswith("_")]


@pytest.mark.parametrize("dtype", list(DType))
def test_weights_are_loaded_in_the_dtype(tiny_checkpoint: Path, make_tiny_sd3: Any, dtype: DType) -> None:
    transformer = load_transformer(Source(kind="directory", location=str(tiny_checkpoint)), dtype)
    assert {parameter.dtype for parameter in transformer.parameters()} == {dtype.torch}
    assert same_weights(transformer, make_tiny_sd3().to(dtype.torch))


def damaged(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Source:
    """A transformer's checkpoint with other weights."""
    path = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    return find_checkpoint(str(directory)).source


QUERY = "transformer_blocks.0.attn.to_q.weight"


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (lambda weights: weights.pop(QUERY), DType.FP32, rf"/transformer lacks {QUERY}; download"),
        (lambda weights: weights.update({QUERY: torch.ones(3)}), DType.FP32, rf"{QUERY} expected shape"),
        (lambda weights: weights.update({QUERY.replace("0", "7"): torch.ones(3)}), DType.FP32,
         r"/transformer has, beyond the layers of its config, transformer_blocks\.7\."),
        (lambda weights: weights[QUERY].view(-1)[5:6].fill_(torch.nan), DType.FP32,
         rf"/transformer: {QUERY} has values that are not finite in fp32; download or convert it again$"),
        (lambda weights: weights[QUERY].view(-1)[5:6].fill_(1e5), DType.FP16,
         rf"/transformer: {QUERY} has values that are not finite in fp16; .*, or give --dtype bf16, whose range is"),
    ],
)  # fmt: skip
def test_weights_of_a_transformer_are_checked(
    tiny_checkpoint: Path, change: Callable[[dict[str, Tensor]], object], dtype: DType, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_transformer(damaged(tiny_checkpoint, change), dtype)
    assert "\n" not in str(caught.value)


def test_what_only_an_older_class_has_is_let_be(tiny_checkpoint: Path, make_tiny_sd3: Any) -> None:
    source = damaged(tiny_checkpoint, lambda weights: weights.update({"caption.y_embedding": torch.ones(3)}))
    assert same_weights(load_transformer(source, DType.FP32), make_tiny_sd3())


@pytest.mark.parametrize(("model", "hub_id"), [("some/sd3", "some/sd3"), ("sd3", None)])
def test_a_snapshot_of_the_hub(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, hub_id: str | None
) -> None:
    asked: list[tuple[str, str | None]] = []
    snapshot = Path(shutil.copytree(tiny_checkpoint, tmp_path / "snapshots" / COMMIT))

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str], **others: Any) -> str:
        asked.append((repo_id, revision))
        assert {"model_index.json", "transformer/*", "vae/config.json"} <= set(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = find_checkpoint(model, revision="v2")
    hub_id = hub_id or published_models()[model].hub_id
    assert checkpoint.source == Source(kind="hub", location=hub_id, revision=COMMIT)  # not the branch, which moves
    load_transformer(checkpoint.source, DType.FP32)
    assert asked == [(hub_id, "v2"), (hub_id, COMMIT)]


def test_a_checkpoint_that_has_gone(tiny_checkpoint: Path) -> None:
    source = find_checkpoint(str(tiny_checkpoint)).source
    shutil.rmtree(tiny_checkpoint)
    with pytest.raises(CheckpointError, match=r"tiny-pipeline is not there any more"):
        load_transformer(source, DType.FP32)


# ------------------------------------------------------------------ the hub


def test_only_the_components_of_a_pipeline_are_downloaded(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own filter over the files that FLUX.1-dev and SD3.5 have there."""
    snapshot = Path(shutil.copytree(tiny_checkpoint, tmp_path / "snapshots" / COMMIT))
    index = ("transformer", "text_encoder", "text_encoder_2", "tokenizer", "scheduler", "vae")
    (snapshot / "model_index.json").write_text(json.dumps({"_class_name": "X"} | {name: ["a", "b"] for name in index}))
    wanted = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "tokenizer/merges.txt",
        "tokenizer/spiece.model",
        "transformer/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    others = [
        "README.md",
        "ae.safetensors",
        "flux1-dev.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder_2/model.fp16-00001-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.fp16.json",
        "text_encoders/t5xxl_fp16.safetensors",
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    ]
    taken: list[str] = []

    def download(repo_id: str, *, revision: str | None, local_files_only: bool, **patterns: Any) -> str:
        taken[:] = filter_repo_objects(wanted + others, **patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert pipeline_snapshot("some/flux", None) == snapshot
    assert sorted(taken) == wanted
    (snapshot / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"some/flux: model_index\.json cannot be read"):
        pipeline_snapshot("some/flux", None)


# ------------------------------------------------------------------ variants


def sharded(directory: Path, make_tiny_sd3: Any, variant: str | None) -> None:
    options = {"max_shard_size": "100KB"} if variant == "bf16" else {}
    make_tiny_sd3().save_pretrained(directory / "transformer", variant=variant, **options)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_weights_that_are_there_as_a_variant_only(tiny_checkpoint: Path, make_tiny_sd3: Any, variant: str) -> None:
    (weights,) = (tiny_checkpoint / "transformer").glob("*.safetensors")
    weights.unlink()
    sharded(tiny_checkpoint, make_tiny_sd3, variant)
    names = {path.name for path in (tiny_checkpoint / "transformer").glob("*.safetensors")}
    assert all(variant_of(name) == variant for name in names)
    assert len(names) > 1 or variant == "fp16"
    checkpoint = find_checkpoint(str(tiny_checkpoint))
    assert same_weights(load_transformer(checkpoint.source, DType.FP32), make_tiny_sd3())
    assert held_bytes(checkpoint, DType.FP32, verify=False) == 0


def test_plain_weights_come_before_variants(tiny_checkpoint: Path, make_tiny_sd3: Any) -> None:
    make_tiny_sd3().half().save_pretrained(tiny_checkpoint / "transformer", variant="fp16", max_shard_size="100KB")
    checkpoint = find_checkpoint(str(tiny_checkpoint))
    assert same_weights(load_transformer(checkpoint.source, DType.FP32), make_tiny_sd3())
    assert held_bytes(checkpoint, DType.FP32, verify=False) == 0


def test_names_of_variants() -> None:
    names = ["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"]
    assert [variant_of(name) for name in names] == ["fp16"] * 3
    assert variant_of("model.safetensors") is variant_of("model-00001-of-00002.safetensors") is None


@pytest.mark.parametrize(("name", "length"), [("PixArtSigmaPipeline", 300), ("PixArtAlphaPipeline", 120)])
def test_text_rows_of_pixarts_pipelines(tmp_path: Path, write_checkpoint: Any, name: str, length: int) -> None:
    directory = write_checkpoint(tmp_path / "pixart", "pixart")
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    (directory / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    assert find_checkpoint(str(directory)).text_length == length


def test_a_config_over_which_diffusers_stumbles(write_checkpoint: Any, tmp_path: Path) -> None:
    """With an UnboundLocalError here."""
    path = write_checkpoint(tmp_path / "pixart", "pixart") / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"activation_fn": None}))
    with pytest.raises(CheckpointError, match=r"transformer/config\.json is not a PixArtTransformer2DModel's \("):
        find_checkpoint(str(tmp_path / "pixart"))
