"""Text encoders and autoencoders as graphs: held against their modules at sizes that they were not traced at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import onnx
import pytest
import torch
import transformers
from diffusers import AutoencoderKL
from torch import nn

from cat_pruning.bundle.profiles import component_profiles, profile_spec
from cat_pruning.bundle.schema import ComponentSpec, ComponentTensor, Geometry
from cat_pruning.checkpoints.checkpoint import find_checkpoint
from cat_pruning.checkpoints.parts import load_module
from cat_pruning.components import Component, with_both_sizes
from cat_pruning.dtype import DType
from cat_pruning.engines.builder.build import build_plan, can_build, plan_specs
from cat_pruning.errors import CheckpointError, EngineError, SettingsError, ShapeError
from cat_pruning.exporter import memory
from cat_pruning.exporter.components import (
    WantedPart,
    export_components,
    export_part,
    folders_of,
    verify_component,
    wanted_parts,
    wrapped,
)
from cat_pruning.exporter.export import ExportConfig, export
from cat_pruning.exporter.pipeline_files import add_pipeline, check_pipeline, copied_files
from cat_pruning.exporter.plans import with_component_plans
from cat_pruning.exporter.progress import logged_stage
from cat_pruning.names import Target
from cat_pruning.settings import PruneSettings

CLIP = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 20, "projection_dim": 12, "bos_token_id": 48, "eos_token_id": 49,
}  # fmt: skip
T5 = {
    "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1,
}  # fmt: skip
MAKERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "CLIP": ("text_encoder", lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))),
    "CLIP, projected": (
        "text_encoder_2",
        lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CLIP)),
    ),
    "T5": (
        "text_encoder_3",
        lambda: transformers.T5EncoderModel._from_config(transformers.T5Config(**T5), attn_implementation="eager"),
    ),
    "VAE": ("vae", lambda: AutoencoderKL(**VAE)),  # with attention and the convolutions beside its halves
}
TEXT_LENGTH = 30


def module_of(kind: str) -> nn.Module:
    """A random module, none of whose parameters is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = MAKERS[kind][1]().eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, mean=0.05, std=0.2)
    return module


@pytest.mark.long
@pytest.mark.parametrize("kind", MAKERS)
def test_graphs_compute_what_their_modules_do(tmp_path: Path, kind: str) -> None:
    name, module = MAKERS[kind][0], module_of(kind)
    written: list[tuple[int, int]] = []
    for spec in export_part(name, module, tmp_path, TEXT_LENGTH, lambda *done: written.append(done)):
        assert spec.component.pipeline_part == name
        assert 0 < verify_component(wrapped(spec.component, module), tmp_path / spec.file, DType.FP32) < 1e-4
        model = onnx.load(tmp_path / spec.file, load_external_data=False)
        assert "/" not in str(model).replace("ai.onnx", "").partition("metadata_props")[2]  # no path of this machine
        other = module_of(kind)
        nn.init.normal_(next(wrapped(spec.component, other).parameters()), std=0.2)
        with pytest.raises(EngineError, match=rf"--verify: \w+ of {spec.file} is off torch's by .*; leave its part"):
            verify_component(wrapped(spec.component, other), tmp_path / spec.file, DType.FP32)
    assert written[-1][0] == written[-1][1] == len(written)


@pytest.mark.long
def test_a_plan_is_built_of_each_kind_of_graph(tmp_path: Path) -> None:
    if not can_build("tensorrt_rtx"):
        pytest.skip("TensorRT-RTX is not installed")
    geometry = Geometry(pixels_per_latent=2, patch_size=2, latent_channels=4, max_latent_size=None, text_length=9)
    profiles = [
        profile_spec(*size, geometry=geometry, settings=PruneSettings(num_clusters=2), guidance=True)
        for size in ((24, 16, 1), (16, 16, 3))
    ]
    specs = [spec for kind in ("T5", "VAE") for spec in export_part(MAKERS[kind][0], module_of(kind), tmp_path, 9)]
    wanted = with_component_plans(plan_specs("tensorrt_rtx"), specs)
    assert [str(plan.part) for plan in wanted] == [
        "prompt", "timestep", "step", "text_encoder_3", "vae_decoder", "vae_encoder",
    ]  # fmt: skip
    assert component_profiles(specs[0], profiles) == [
        dict.fromkeys(("input_ids", "attention_mask"), ((1, 1), (1, 9), (3, 512)))
    ]
    decoder = component_profiles(specs[1], profiles)
    assert decoder == [{"latents": (shape,) * 3} for shape in ((1, 4, 12, 8), (3, 4, 8, 8), (1, 4, 8, 8))]
    assert component_profiles(specs[2], profiles)[0] == {"image": ((1, 3, 24, 16),) * 3}
    for spec in specs[:2]:
        plan = next(plan for plan in wanted if plan.part is spec.component)
        build_plan(plan, tmp_path / spec.file, tmp_path / plan.file, component_profiles(spec, profiles))
        assert (tmp_path / plan.file).stat().st_size > 10_000


@pytest.mark.long
def test_t5_in_fp16_keeps_what_transformers_keeps_in_fp32(tmp_path: Path) -> None:
    module_of("T5").save_pretrained(tmp_path / "t5")
    module = load_module(transformers.T5EncoderModel, tmp_path / "t5", torch.float16, attn_implementation="eager")
    (spec,) = export_part("text_encoder", module.eval(), tmp_path, TEXT_LENGTH)
    assert verify_component(wrapped(spec.component, module), tmp_path / spec.file, DType.FP16) < 3e-2
    weights = onnx.load(tmp_path / spec.file, load_external_data=False).graph.initializer
    kept = {each.name for each in weights if each.data_type == onnx.TensorProto.FLOAT and len(each.dims) == 2}
    assert kept == {f"component.encoder.block.{layer}.layer.1.DenseReluDense.wo.weight.T" for layer in (0, 1)}
    assert spec.outputs[0].dtype == "FLOAT16"


def test_weights_that_no_export_can_have(tmp_path: Path) -> None:
    module = module_of("CLIP")
    with torch.no_grad():
        next(module.parameters())[0, 0] = 1e6
    module.save_pretrained(tmp_path / "clip")
    part = WantedPart(name="text_encoder", part_class=transformers.CLIPTextModel, folder=tmp_path / "clip")
    with pytest.raises(
        CheckpointError, match=r"clip: .*weight has values that are not finite in fp16; .* --dtype bf16"
    ):
        export_components([part], tmp_path, DType.FP16, TEXT_LENGTH, logged_stage, verify=False)
    assert not list(tmp_path.glob("*.onnx"))


def test_a_part_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda: 2**30)
    config = ExportConfig(model="sd3-mini", out=tmp_path / "out", components=("vae",), targets=(Target.ONNX,))
    with pytest.raises(
        EngineError, match=r"vae: weights of .* GiB of memory to be exported, .*; leave it out of --comp"
    ):
        export(config)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_do_not_fit() -> None:
    spec = _t5_spec()
    assert spec.sizes_of({"input_ids": (2, 7), "attention_mask": (2, 7)}) == {"batch": 2, "text_length": 7}
    for shapes in ({"input_ids": (2, 7), "attention_mask": (2, 6)}, {"input_ids": (7,)}, {"input_ids": (2, 7)}):
        with pytest.raises(
            ShapeError, match=r"text_encoder\.onnx: \w+ has shape \(.*\), expected \(batch, text_length\)"
        ):
            spec.sizes_of(shapes)
    with pytest.raises(
        ShapeError, match=r"input_ids has shape \(0, 7\), expected \(batch, text_length\) and nothing empty"
    ):
        spec.sizes_of({"input_ids": (0, 7), "attention_mask": (0, 7)})
    assert with_both_sizes({"height": 9}, 8) == {"height": 9, "latent_height": 1}
    with pytest.raises(ShapeError, match="an image has a height of 7 pixels, expected 8 at least"):
        with_both_sizes({"height": 7}, 8)


def test_parts_that_cannot_be_graphs(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = json.loads((tiny_checkpoint / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (tiny_checkpoint / "model_index.json").write_text(json.dumps(index))
    checkpoint = find_checkpoint(str(tiny_checkpoint))
    parts = wanted_parts(checkpoint, ("text_encoder", "text_encoder_3", "vae", "text_encoder"))
    assert [part.name for part in parts] == ["text_encoder"]  # there is no third one
    assert "vae is a AutoencoderTiny, of which no graph can be made: it is taken along for torch" in caplog.text
    random = find_checkpoint("sd3", random_weights=True)
    with pytest.raises(SettingsError, match="--components: sd3 has no text encoders and no autoencoder"):
        wanted_parts(random, ("vae",))
    assert wanted_parts(random, ()) == ()
    index["vae"] = ["os", "AutoencoderKL"]  # a library that nothing is imported of
    (tiny_checkpoint / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"vae is \['os', 'AutoencoderKL'\]; expected a class of diffusers"):
        wanted_parts(checkpoint, ("vae",))


def test_parts_of_the_hub_come_into_the_bundle(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Path(shutil.copytree(tiny_checkpoint, tmp_path / "snapshots" / "0123"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    checkpoint = find_checkpoint("some/sd3")
    spec = add_pipeline(checkpoint, tmp_path / "hub", {})
    assert spec is not None
    assert (spec.kind, spec.hub_id) == ("hub", "some/sd3")
    assert not (tmp_path / "hub").exists()
    parts = wanted_parts(checkpoint, ("text_encoder", "vae"))
    spec = add_pipeline(checkpoint, tmp_path / "pipeline", {part.name: part.folder for part in parts})
    assert spec is not None
    assert (spec.kind, spec.path) == ("copied", "pipeline")
    copied = {path.relative_to(tmp_path / "pipeline").as_posix() for path in (tmp_path / "pipeline").rglob("*")}
    assert {name for name in copied if name.endswith(".safetensors")} == {"text_encoder_2/model.safetensors"}
    assert {"text_encoder/config.json", "vae/config.json", "tokenizer/tokenizer.json", "model_index.json"} <= copied
    # The free space that is asked for before is that of these files; without graphs, nothing of the hub is copied.
    assert len(copied_files(checkpoint, folders_of(parts))) == len([name for name in copied if "." in name])
    assert copied_files(checkpoint) == []
    (snapshot / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer is incomplete"):
        check_pipeline(checkpoint, folders_of(parts))


def _t5_spec() -> Any:
    shape = ("batch", "text_length")
    return ComponentSpec(
        component=Component.TEXT_ENCODER,
        file="text_encoder.onnx",
        inputs=tuple(
            ComponentTensor(name=name, dtype="INT32", shape=shape) for name in ("input_ids", "attention_mask")
        ),
        outputs=(ComponentTensor(name="last_hidden_state", dtype="FLOAT", shape=(*shape, 16)),),
        text_lengths=(1, 9, 512),
    )
