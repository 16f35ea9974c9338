"""A bundle whose text encoder and autoencoder are graphs, in unmodified pipelines, beside the untouched parts."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import AutoencoderKL, StableDiffusion3Img2ImgPipeline
from tensorrt_double import write_plan
from transformers import CLIPTextModelWithProjection

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.profiles import component_profiles
from cat_pruning.bundle.schema import ComponentSpec, ComponentTensor
from cat_pruning.components import Component
from cat_pruning.dtype import DType
from cat_pruning.engines import plan as plan_module
from cat_pruning.engines.component_engine import ComponentEngine
from cat_pruning.engines.onnxruntime_component import OnnxRuntimeComponent
from cat_pruning.engines.plan import Plan
from cat_pruning.engines.plan_component import PlanComponent
from cat_pruning.errors import BundleError, EngineError, SettingsError, ShapeError
from cat_pruning.exporter.components import wrapped
from cat_pruning.runtime.components import EngineTextEncoder, engine_autoencoder, engine_text_encoder, engines_of
from cat_pruning.runtime.engine_choice import component_engines
from cat_pruning.runtime.pipeline import load_pipeline

PROMPT = "a large red circle left of a small blue star on a plain black background"
CALL: dict[str, Any] = {
    "height": 64, "width": 80, "num_inference_steps": 2, "guidance_scale": 3.0, "max_sequence_length": 24,
    "output_type": "np",
}  # fmt: skip
SHAPES_HERE: dict[str, tuple[str | int, ...]] = {
    "latents": ("batch", 4, "latent_height", "latent_width"),
    "image": ("batch", 3, "height", "width"),
    "moments": ("batch", 8, "latent_height", "latent_width"),
}
CLOSE = 1e-4  # of pixels and embeddings, which differ by the order of sums


@pytest.fixture(scope="module")
def pipe(component_bundle: Path) -> Any:
    loaded = load_pipeline(component_bundle)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def original(component_bundle: Path) -> Any:
    """The same weights, all in torch, out of the checkpoint: the bundle has not got them."""
    loaded = load_pipeline(component_bundle, "torch")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def released(pipe: Any) -> Iterator[dict[Component, ComponentEngine]]:
    """The engines, none of them loaded."""
    engines = engines_of(pipe)
    for engine in engines.values():
        engine.release()
    yield engines
    pipe.vae.disable_tiling()


def images(pipe: Any, prompt: Any = PROMPT, **changes: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipe(prompt, generator=generator, **{**CALL, **changes}).images


def embeddings(pipe: Any, *prompts: str, **arguments: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        texts = [list(prompts)] * 3
        found = pipe.encode_prompt(*texts, device="cpu", max_sequence_length=24, **arguments)
    return [each for each in found if each is not None]


def differ(ours: Any, theirs: Any) -> float:
    return max(float(abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(ours, theirs, strict=True))


def test_the_bundle_has_no_weights_of_torch_for_them(component_bundle: Path, pipe: Any, original: Any) -> None:
    files = Bundle.open(component_bundle).manifest.files
    weights = [name for name in files if name.endswith(".safetensors")]
    assert weights == ["pipeline/text_encoder_2/model.safetensors"]
    assert {"text_encoder.onnx.data", "vae_decoder.onnx.data", "vae_encoder.onnx.data"} <= set(files)
    command = Bundle.open(component_bundle).export_command()
    assert "--components text_encoder,vae " in command
    assert isinstance(pipe.text_encoder, EngineTextEncoder)
    assert type(pipe.vae) is AutoencoderKL
    assert not any(parameter.numel() for part in (pipe.text_encoder, pipe.vae) for parameter in part.parameters())
    assert type(pipe.text_encoder_2) is type(original.text_encoder) is CLIPTextModelWithProjection
    assert (pipe.vae.dtype, pipe.vae.device, pipe.text_encoder.dtype) == (
        torch.float32, torch.device("cpu"), torch.float32,
    )  # fmt: skip
    assert pipe.to(torch.float16).text_encoder.dtype is torch.float32  # the graph's, wherever the pipeline goes
    pipe.text_encoder_2.float()


@pytest.mark.parametrize(
    ("prompts", "arguments"),
    [
        ((PROMPT,), {}),
        ((PROMPT, "a blue star"), {"negative_prompt": ["blue", "a small red ring"]}),
        ((PROMPT + " and more" * 40,), {}),  # cut
        ((PROMPT,), {"clip_skip": 1}),
        (("",), {"num_images_per_prompt": 2}),
    ],
)
def test_embeddings_are_those_of_torch(
    pipe: Any, original: Any, prompts: tuple[str, ...], arguments: dict[str, Any]
) -> None:
    ours, theirs = (embeddings(each, *prompts, **arguments) for each in (pipe, original))
    assert len(ours) == 4
    assert differ(ours, theirs) < CLOSE
    if "clip_skip" in arguments:
        assert differ(ours, embeddings(pipe, *prompts)) > 0.1


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "a blue star"]])
def test_images_are_those_of_torch(pipe: Any, original: Any, prompt: Any) -> None:
    assert differ(images(pipe, prompt), images(original, prompt)) < CLOSE


def test_image_to_image_and_tiles(released: dict[Component, ComponentEngine], pipe: Any, original: Any) -> None:
    start = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    call = {"image": start, "strength": 0.6, "height": 96, "width": 64}
    both = [StableDiffusion3Img2ImgPipeline(**each.components) for each in (pipe, original)]
    for each in both:
        each.set_progress_bar_config(disable=True)
    whole = images(both[0], **call)
    assert differ(whole, images(both[1], **call)) < CLOSE
    for each in both:
        each.vae.enable_tiling()
        each.vae.tile_sample_min_size, each.vae.tile_latent_min_size = 48, 12
    tiled = images(both[0], **call)
    assert differ(tiled, images(both[1], **call)) < CLOSE
    assert differ(tiled, whole) > CLOSE
    original.vae.disable_tiling()


def test_weights_come_when_they_are_needed(
    released: dict[Component, ComponentEngine], component_bundle: Path, pipe: Any
) -> None:
    assert not any(engine.is_loaded for engine in released.values())
    images(pipe, output_type="latent")
    assert [component for component, engine in released.items() if engine.is_loaded] == [Component.TEXT_ENCODER]
    with pytest.raises(SettingsError, match=r"offload: text_encoder_2 of this bundle run in torch; export with --com"):
        load_pipeline(component_bundle, offload="text")


def test_many_threads_at_once(released: dict[Component, ComponentEngine], pipe: Any, original: Any) -> None:
    engine = released[Component.TEXT_ENCODER]
    loads: list[int] = []
    load, ids = engine._load, torch.arange(24)[None]
    engine._load = lambda: (loads.append(threading.get_ident()), load())[1]
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        results = list(pool.map(lambda shift: pipe.text_encoder(ids + shift).text_embeds, range(8)))
        expected = [original.text_encoder(ids + shift).text_embeds for shift in range(8)]
    engine._load = load
    assert len(loads) == 1
    assert differ(results, expected) < CLOSE


def test_what_a_graph_does_not_take(pipe: Any) -> None:
    encoder, ids = pipe.text_encoder, torch.ones(1, 24, dtype=torch.long)
    for name, value in (("output_attentions", True), ("position_ids", ids), ("attention_mask", ids)):
        with pytest.raises(SettingsError, match=f"text_encoder is a graph and takes no {name}; export the bundle wi"):
            encoder(ids, **{name: value})
    with pytest.raises(SettingsError, match="text_encoder is a graph, which has no load_adapter"):
        encoder.load_adapter("x")
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_"
    adapter = {f"{name}A.weight": torch.zeros(2, 96), f"{name}B.weight": torch.zeros(96, 2)}
    with pytest.raises(SettingsError, match="text_encoder is a graph, which has no text_model; export the bundle with"):
        pipe.load_lora_weights(adapter)
    with pytest.raises(SettingsError, match="vae is a graph, which has no save_pretrained"):  # not a config alone
        pipe.vae.save_pretrained("x")
    with pytest.raises(AttributeError, match="no attribute 'anything_else'"):
        _ = encoder.anything_else
    with pytest.raises(ShapeError, match=r"text_encoder\.onnx: input_ids has shape \(24,\), expected \(batch, text"):
        encoder(ids[0])
    assert encoder(ids, return_dict=False)[0].shape == (1, 96)
    with pytest.raises(ShapeError, match=r"vae_decoder\.onnx: latents has shape \(1, 5, 4, 4\), expected \(batch, 4,"):
        pipe.vae.decode(torch.zeros(1, 5, 4, 4))


def test_what_accelerate_moves_stays_where_it_is(pipe: Any, original: Any) -> None:
    """`enable_model_cpu_offload` does this to every part."""
    hook = None
    for part in (pipe.text_encoder, pipe.vae):
        _, hook = accelerate.cpu_offload_with_hook(part, "cpu", prev_module_hook=hook)
    assert differ(embeddings(pipe, PROMPT), embeddings(original, PROMPT)) < CLOSE
    assert pipe.vae.decode(torch.zeros(1, 4, 4, 4)).sample.shape == (1, 3, 16, 16)
    for part in (pipe.text_encoder, pipe.vae):
        remove_hook_from_module(part, recurse=True)


def test_tiles_of_an_autoencoder_with_convolutions_beside_its_halves(tmp_path: Path) -> None:
    """Where tiles are, diffusers asks the config whether there are any, and the graphs have them."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    vae.save_config(tmp_path)

    def engine(component: Component, given: str, returned: str) -> ComponentEngine:
        graph = wrapped(component, vae)
        tensors = {
            name: ComponentTensor(name=name, dtype="FLOAT", shape=SHAPES_HERE[name]) for name in (given, returned)
        }
        spec = ComponentSpec(
            component=component, file=component.onnx, inputs=(tensors[given],), outputs=(tensors[returned],)
        )
        return ComponentEngine(
            spec, lambda: lambda inputs: {returned: graph(**inputs)}, DType.FP32, torch.device("cpu")
        )

    ours = engine_autoencoder(
        tmp_path,
        engine(Component.VAE_DECODER, "latents", "image"),
        engine(Component.VAE_ENCODER, "image", "moments"),
        2,
    )
    image = torch.rand(1, 3, 24, 40)
    with torch.no_grad():
        for tiled in (False, True):
            for each in (ours, vae):
                each.use_tiling = tiled
            latents = ours.encode(image).latent_dist.mean
            assert differ(latents, vae.encode(image).latent_dist.mean) < CLOSE
            assert differ(ours.decode(latents).sample, vae.decode(latents).sample) < CLOSE


def test_a_graph_that_is_not_the_manifests(component_bundle: Path) -> None:
    manifest, cpu = Bundle.open(component_bundle).manifest, torch.device("cpu")
    decoder, text = manifest.component(Component.VAE_DECODER), manifest.component(Component.TEXT_ENCODER)
    (image,) = decoder.outputs
    halves = image.model_copy(update={"dtype": "FLOAT16"})
    wide = image.model_copy(update={"shape": ("batch", 4, "height", "width")})
    for spec, file in (
        (decoder.model_copy(update={"outputs": (halves,)}), decoder.file),
        (decoder.model_copy(update={"outputs": (wide,)}), decoder.file),
        (manifest.component(Component.VAE_ENCODER), decoder.file),
    ):
        with pytest.raises(BundleError, match=rf"{file} has other inputs or outputs than the manifest says"):
            OnnxRuntimeComponent(spec, component_bundle / file, cpu, 4)
    engine = ComponentEngine(text, lambda: pytest.fail("nothing is loaded"), DType.FP32, cpu)
    with pytest.raises(ValueError, match=r"text_encoder\.onnx is not the graph of a T5EncoderModel"):
        engine_text_encoder(component_bundle / "pipeline/text_encoder", "T5EncoderModel", engine)


def test_another_dtype_and_damage(component_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"dtype fp16: text_encoder, vae are graphs in fp32; leave dtype out"):
        load_pipeline(component_bundle, dtype="fp16")
    copy = shutil.copytree(component_bundle, tmp_path / "copy")
    with (copy / "vae_decoder.onnx.data").open("r+b") as file:
        file.write(b"other")
    pipe = load_pipeline(copy)  # nothing of it has been read
    with pytest.raises(BundleError, match=r"vae_decoder\.onnx\.data was changed after the export"):
        pipe.vae.decode(torch.zeros(1, 4, 4, 4))
    config = json.loads((copy / "pipeline/model_index.json").read_text())
    assert config["vae"] == ["diffusers", "AutoencoderKL"]


def test_plans_compute_them_too(
    component_bundle: Path, original: Any, library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "tensorrt_library", lambda flavour: library)
    manifest, cpu = Bundle.open(component_bundle).manifest, torch.device("cpu")

    def engine(component: Component) -> ComponentEngine:
        spec, file = manifest.component(component), tmp_path / f"{component}.plan"
        write_plan(file, component_bundle / spec.file, component_profiles(spec, manifest.profiles), {})
        return ComponentEngine(spec, lambda: PlanComponent(spec, Plan("tensorrt", file, cpu), cpu, 4), DType.FP32, cpu)

    folder = component_bundle / "pipeline" / "vae"
    vae = engine_autoencoder(folder, engine(Component.VAE_DECODER), engine(Component.VAE_ENCODER), 4)
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(2):
            image = vae.decode(latents).sample
            assert differ(image, original.vae.decode(latents).sample) < CLOSE
            moments = vae.encode(image).latent_dist.parameters
            assert differ(moments, original.vae.encode(image).latent_dist.parameters) < 50 * CLOSE  # of up to 30
    assert len(library.contexts) == 2  # one for each plan
    other = Plan("tensorrt", tmp_path / "vae_decoder.plan", cpu)
    with pytest.raises(EngineError, match=r"the plan of vae_encoder\.onnx has other inputs or outputs than the graph"):
        PlanComponent(manifest.component(Component.VAE_ENCODER), other, cpu, 4)
    with pytest.raises(ValueError, match="4 pixels are a latent, in the graphs 8"):
        engine_autoencoder(folder, engine(Component.VAE_DECODER), engine(Component.VAE_ENCODER), 8)
    with pytest.raises(ShapeError, match=r"latents has shape \(1, 4, 16, 16\), the plan vae_decoder\.plan was built"):
        vae.decode(latents[:, :, :16, :16])


def test_none_beside_the_torch_engine(component_bundle: Path, mini_bundle: Path) -> None:
    assert component_engines(Bundle.open(component_bundle), "torch") == {}
    assert component_engines(Bundle.open(mini_bundle), "onnxruntime") == {}
