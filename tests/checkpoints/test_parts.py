"""Pipelines on disk with parts that are damaged: refused by name, and never filled in at random."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cat_pruning.checkpoints.parts import check_finite, check_parts, load_parts
from cat_pruning.errors import CheckpointError
from cat_pruning.models import miniatures

Damage = Callable[[Path], object]
SD3 = "SD3Transformer2DModel"
FC1 = "text_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(params=["sd3-mini", "pixart-mini"])
def any_pipeline(request: pytest.FixtureRequest) -> Path:
    return miniatures()[request.param]


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """sd3-mini's, to damage."""
    ignored = shutil.ignore_patterns("*.png", "*.md", "transformer")
    return Path(shutil.copytree(miniatures()["sd3-mini"], tmp_path / "pipeline", ignore=ignored))


def weights(part: str, change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(pipeline: Path) -> None:
        (path,) = (pipeline / part).glob("*.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def index(**changes: Any) -> Damage:
    return changed("model_index.json", **changes)


def without(part: str) -> Damage:
    def damage(pipeline: Path) -> None:
        path = pipeline / "model_index.json"
        entries = json.loads(path.read_text())
        del entries[part]
        path.write_text(json.dumps(entries))

    return damage


def pickled(pipeline: Path) -> None:
    (path,) = (pipeline / "vae").glob("*.safetensors")
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def written(name: str, content: str) -> Damage:
    return lambda pipeline: (pipeline / name).write_text(content)


def changed(name: str, **changes: Any) -> Damage:
    def damage(pipeline: Path) -> None:
        path = pipeline / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def larger_token(pipeline: Path) -> None:
    path = pipeline / "tokenizer" / "tokenizer.json"
    fields = json.loads(path.read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary[next(token for token in vocabulary if "star" in token)] = 100_000
    path.write_text(json.dumps(fields))


def gone(*names: str) -> Damage:
    return lambda pipeline: [(pipeline / name).unlink() for name in names]


def test_whole_pipelines_are_fine(any_pipeline: Path) -> None:
    """Of safetensors without a weight read: no module has memory."""
    transformer_class = json.loads((any_pipeline / "model_index.json").read_text())["transformer"][1]
    check_parts(any_pipeline, transformer_class)
    loaded = load_parts(any_pipeline, transformer_class, device_map="meta")
    assert loaded.transformer is None
    assert {parameter.device.type for parameter in loaded.vae.parameters()} == {"meta"}
    for part in ("vae", "text_encoder"):
        check_finite(any_pipeline / part)


DAMAGES: list[tuple[Damage, str]] = [
    (weights("text_encoder", lambda tensors: tensors.pop(FC1)), rf"/text_encoder lacks {FC1}; download"),
    (weights("text_encoder", lambda tensors: tensors.clear() or tensors.update(x=torch.ones(1))),
     r"/text_encoder lacks \S+, \S+, \S+ and \d+ more weights"),
    (weights("text_encoder_2", lambda tensors: tensors.update({FC1: torch.ones(3)})),
     rf"/text_encoder_2 has in another shape {FC1}"),
    (weights("text_encoder", lambda tensors: tensors.update({FC1.replace(".0.", ".9."): torch.ones(3)})),
     r"/text_encoder has, beyond the layers of its config, text_model\.encoder\.layers\.9\."),
    (weights("vae", lambda tensors: tensors.pop("decoder.conv_in.weight")), r"/vae lacks decoder\.conv_in\.weight"),
    (weights("vae", lambda tensors: tensors.update({"decoder.conv_in.weight": torch.ones(3)})),
     r"/vae cannot be loaded \(.*decoder\.conv_in\.weight expected shape"),
    (pickled, r"/vae has no \*\.safetensors weights, only pickled ones \(diffusion_pytorch_model\.bin\)"),
    (lambda pipeline: shutil.rmtree(pipeline / "text_encoder"), r"/text_encoder is incomplete: config\.json is"),
    (lambda pipeline: shutil.rmtree(pipeline / "tokenizer"), r"/tokenizer is incomplete: tokenizer_config\.json is"),
    (lambda pipeline: shutil.rmtree(pipeline / "scheduler"), r"/scheduler is incomplete: scheduler_config\.json is"),
    (gone("tokenizer/tokenizer.json"), r"/tokenizer has no vocabulary \(tokenizer\.json, or vocab\.json and merges"),
    (gone("vae/config.json"), r"/vae is incomplete: config\.json is missing"),
    (written("tokenizer/tokenizer.json", "{"), r"the pipeline cannot be loaded \("),
    (written("tokenizer/tokenizer.json", "{}"), r"the pipeline cannot be loaded \("),
    (changed("scheduler/scheduler_config.json", num_train_timesteps=10**9),
     r"num_train_timesteps is 1000000000, expected a number of at most"),
    (changed("scheduler/scheduler_config.json", shift_terminal={}), r"shift_terminal is \{\}, expected a number"),
    (changed("vae/config.json", scaling_factor=None), r"vae/config\.json: scaling_factor is None, expected a number"),
    (changed("vae/config.json", shift_factor=float("nan")),
     r"shift_factor is nan, expected a number of at most 16777216 or null"),
    (changed("tokenizer/tokenizer_config.json", model_max_length=1000),
     r"model_max_length of tokenizer is 1000, expected a whole number from 1 to its text encoder's \d+"),
    (changed("tokenizer_2/tokenizer_config.json", model_max_length=[]), r"model_max_length of tokenizer_2 is \[\]"),
    (larger_token, r"tokenizer has the token 100000, its text encoder knows \d+ tokens"),
    (index(_class_name="FluxPipeline", transformer=["diffusers", "FluxTransformer2DModel"]),
     r"a FluxPipeline has a FluxTransformer2DModel, the transformer is a SD3Transformer2DModel"),
    (written("scheduler/scheduler_config.json", "[]"), r"scheduler_config\.json: expected a JSON object"),
    (written("text_encoder/config.json", '{"hidden_size": "x"}'), r"/text_encoder cannot be loaded \(.*hidden_size"),
    (written("vae/config.json", '{"layers_per_block": 1000000000000}'),
     r"/vae/config\.json: layers_per_block is 1000000000000, expected at most 1024"),
    (written("text_encoder/config.json", '{"num_hidden_layers": 1000000000}'), r"num_hidden_layers is 1000000000, exp"),
    (written("vae/config.json", '{"block_out_channels": 3}'), r"/vae cannot be loaded \("),
    (written("model_index.json", "[" * 100_000), r"model_index\.json cannot be read: it is nested too deeply"),
    (index(_class_name="Nope"), r"_class_name is 'Nope', which is no pipeline of diffusers"),
    (index(_class_name="AutoencoderKL"), r"_class_name is 'AutoencoderKL', which is no pipeline"),
    (index(_class_name=["pipeline", "Own"]), r"_class_name is \['pipeline', 'Own'\], which is no pipeline"),
    (index(vae=["diffusers", "Nope"]), r"vae is \['diffusers', 'Nope'\]; expected a class of diffusers"),
    (index(vae=["os", "system"]), r"vae is \['os', 'system'\]; expected a class of"),
    (index(vae=["diffusers"]), r"vae is \['diffusers'\]; expected a class of"),
    (index(vae=7), r"vae is 7; expected a class of"),
    (index(text_encoder=["transformers", "T5EncoderModel"]), r"/text_encoder lacks encoder\.block\.0\."),
    (without("scheduler"), r"model_index\.json names no scheduler, which a StableDiffusion3Pipeline has"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message[:40] for _, message in DAMAGES])
def test_what_is_damaged_is_named(pipeline: Path, damage: Damage, message: str) -> None:
    damage(pipeline)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_parts(pipeline, SD3)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=message):
        load_parts(pipeline, SD3)  # with the weights


def test_weights_of_older_classes_are_let_be(pipeline: Path) -> None:
    weights("text_encoder", lambda tensors: tensors.update({"text_model.embeddings.position_ids": torch.ones(1)}))(
        pipeline
    )
    check_parts(pipeline, SD3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(pipeline: Path, value: float) -> None:
    weights("vae", lambda tensors: tensors["decoder.conv_in.weight"].view(-1)[7:8].fill_(value))(pipeline)
    check_finite(pipeline / "text_encoder")
    with pytest.raises(CheckpointError, match=r"safetensors: decoder\.conv_in\.weight has values that are not finite"):
        check_finite(pipeline / "vae")
