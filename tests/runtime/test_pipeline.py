from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from cat_pruning.checkpoints.library_logs import quiet_diffusers
from cat_pruning.errors import BundleError, CheckpointError, EngineError
from cat_pruning.exporter.export import ExportConfig, export
from cat_pruning.files import sha256
from cat_pruning.names import Target
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings


@pytest.fixture
def copied_bundle(mini_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to change; links would be refused or shared."""
    return Path(shutil.copytree(mini_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("*.plan", "*.engine")))


def edit_manifest(bundle: Path, **changes: Any) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    missing = [name for name in manifest["files"] if not (bundle / name).exists()]
    for name in missing:  # plans that were not copied
        del manifest["files"][name]
    manifest["plans"] = [plan for plan in manifest["plans"] if plan["file"] not in missing]
    (bundle / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize("name", ["auto", "onnxruntime", "torch"])
def test_a_bundle_is_a_pipeline(mini_bundle: Path, name: str, mini_parts: dict[str, Any]) -> None:
    pipe = load_pipeline(mini_bundle, name)
    assert type(pipe) is StableDiffusion3Pipeline
    assert isinstance(pipe.transformer, CatTransformer)
    assert pipe.transformer.engine.name == ("onnxruntime" if name == "auto" else name)
    assert pipe.transformer.settings == PruneSettings()
    assert pipe.vae_scale_factor == 4
    assert pipe.default_sample_size == 32  # read off the transformer
    assert pipe.patch_size == 2
    for part, original in mini_parts.items():
        if part != "transformer":
            assert type(pipe.components[part]) is type(original), part
    for part in ("vae", "text_encoder", "text_encoder_2"):
        theirs = mini_parts[part].state_dict()
        for key, tensor in pipe.components[part].state_dict().items():
            assert torch.equal(tensor, theirs[key]), f"{part}.{key}"


def test_an_image_of_the_bundle(mini_bundle: Path, sample: Callable[..., Any]) -> None:
    pipe = load_pipeline(mini_bundle, settings=PruneSettings(full_steps=3, num_clusters=6))
    pipe.set_progress_bar_config(disable=True)
    assert sample(pipe, 6, (64, 64)).kinds == "FFFPPP"
    (image,) = pipe("a blue star", height=64, width=96, num_inference_steps=4, max_sequence_length=24).images
    assert image.size == (96, 64)
    other = StableDiffusion3Img2ImgPipeline(**pipe.components)
    assert other.transformer is pipe.transformer


def test_the_parts_in_another_dtype(mini_bundle: Path) -> None:
    pipe = load_pipeline(mini_bundle, dtype=torch.bfloat16)
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.transformer.dtype == torch.float32


@pytest.mark.parametrize("name", ["pipeline/scheduler/scheduler_config.json", "step.onnx.data", "step.onnx"])
def test_an_edited_file(copied_bundle: Path, name: str) -> None:
    edit_manifest(copied_bundle)
    content = bytearray((copied_bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied_bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} was changed after the export.*cat-export"):
        load_pipeline(copied_bundle)


def test_an_added_file(copied_bundle: Path) -> None:
    edit_manifest(copied_bundle)
    (copied_bundle / "pipeline" / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BundleError, match=r"diffusion_pytorch_model\.bin added after the export"):
        load_pipeline(copied_bundle)


def test_a_missing_file(copied_bundle: Path) -> None:
    edit_manifest(copied_bundle)
    (copied_bundle / "pipeline" / "vae" / "config.json").unlink()
    with pytest.raises(BundleError, match=r"vae/config\.json is missing"):
        load_pipeline(copied_bundle)


def test_an_unknown_engine(mini_bundle: Path) -> None:
    with pytest.raises(EngineError, match="'nonsense' is not known; known are auto, tensorrt, tensorrt_rtx, "):
        load_pipeline(mini_bundle, "nonsense")


def test_a_checkpoint_that_is_gone(copied_bundle: Path, tmp_path: Path) -> None:
    """The torch engine needs the weights where the export found them; ONNX Runtime does not."""
    location = str(tmp_path / "gone")
    edit_manifest(copied_bundle, source={"kind": "directory", "location": location, "revision": None, "seed": None})
    with pytest.raises(CheckpointError, match=f"{location} is not there any more"):
        load_pipeline(copied_bundle, "torch")
    load_pipeline(copied_bundle, "onnxruntime")


@pytest.mark.parametrize("length", [24, 10**9])
def test_a_text_length_that_its_pipeline_does_not_make(copied_bundle: Path, length: int) -> None:
    manifest = json.loads((copied_bundle / "manifest.json").read_text())
    edit_manifest(copied_bundle, geometry=manifest["geometry"] | {"text_length": length})
    with pytest.raises(BundleError, match=rf"text_length is {length}, its pipeline makes 25 to 536 text tokens"):
        load_pipeline(copied_bundle)


def test_random_weights_of_no_published_architecture(copied_bundle: Path) -> None:
    edit_manifest(copied_bundle, source={"kind": "random", "location": "sd3-mini", "revision": None, "seed": 0})
    with pytest.raises(CheckpointError, match="no published architecture is called sd3-mini"):
        load_pipeline(copied_bundle, "torch")


def test_a_bundle_without_a_pipeline(copied_bundle: Path) -> None:
    """As an export with random weights leaves it."""
    edit_manifest(copied_bundle, pipeline=None)
    with pytest.raises(BundleError, match=r"no text encoders, VAE or scheduler; use CatTransformer\.from_bundle"):
        load_pipeline(copied_bundle)
    assert CatTransformer.from_bundle(copied_bundle).engine.name == "onnxruntime"


@pytest.mark.long
@pytest.mark.parametrize("plain", [(), ("text_encoder", "vae")])
def test_parts_that_are_there_as_a_variant_only(tiny_checkpoint: Path, tmp_path: Path, plain: tuple[str, ...]) -> None:
    source = tmp_path / "source"
    with quiet_diffusers():
        original = StableDiffusion3Pipeline.from_pretrained(tiny_checkpoint, text_encoder_3=None, tokenizer_3=None)
    original.save_pretrained(source, variant="fp16")
    for part in plain:
        for path in (source / part).glob("*.fp16.safetensors"):
            path.rename(path.with_name(path.name.replace(".fp16.", ".")))
    bundle = export(ExportConfig(model=str(source), out=tmp_path / "bundle", text_length=48, targets=(Target.ONNX,)))
    assert bundle.manifest.pipeline is not None
    assert bundle.manifest.pipeline.variant == "fp16"
    pipe = load_pipeline(bundle.path)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        theirs = original.components[part].state_dict()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in pipe.components[part].state_dict().items())


def test_a_weight_that_is_missing_is_not_made_up(copied_bundle: Path) -> None:
    """Nor in a bundle of a version that did not check what it copied."""
    name = "pipeline/text_encoder/model.safetensors"
    path = copied_bundle / name
    weights = load_file(path)
    del weights["text_model.encoder.layers.0.mlp.fc1.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    files = json.loads((copied_bundle / "manifest.json").read_text())["files"]
    files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    edit_manifest(copied_bundle, files=files)
    edit_manifest(copied_bundle)
    with pytest.raises(BundleError, match=r"other parts cannot be loaded: .*/text_encoder lacks \S*fc1.*export again"):
        load_pipeline(copied_bundle)
