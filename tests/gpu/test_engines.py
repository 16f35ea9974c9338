"""ONNX Runtime and the plans on a GPU against the torch engine on the CPU. On the CPU, the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.engines.builder.build import can_build
from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.exporter.export import ExportConfig, export
from cat_pruning.families import family_named
from cat_pruning.names import FLAVOURS, TITLES, Flavour, Target
from cat_pruning.runtime.engine_choice import engine_from_bundle
from cat_pruning.runtime.transformer import CatTransformer

Make = Callable[..., Any]


@pytest.mark.long
def test_onnxruntime(device: torch.device, onnx_bundle: Path, assert_agrees: Callable[..., None]) -> None:
    import onnxruntime

    if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    manifest = Bundle.open(onnx_bundle).manifest
    family = family_named(manifest.family, manifest.transformer_config)
    engine = OnnxRuntimeStepEngine(onnx_bundle, family, manifest.dtype.torch, device)
    assert_agrees(engine)
    assert_agrees(engine, (12, 20))


@pytest.fixture
def assert_takes_adapters(make: Make, sample: Make, assert_same_image: Make) -> Callable[[StepEngine], None]:
    """Asserts that an engine computes an adapter's image as the torch engine on the CPU does, and goes back."""

    def check(engine: StepEngine) -> None:
        rounding = 1e-2 if engine.device.type == "cuda" else 1e-3
        transformer, reference = CatTransformer(engine), make(torch.device("cpu"), captures=False, whole=True)
        generator, weights = torch.Generator().manual_seed(0), {}
        for name, module in reference.engine.transformer.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "ff.net.2", "norm1.linear")):
                weights[f"{name}.lora_A.weight"] = 0.1 * torch.randn(2, module.in_features, generator=generator)
                weights[f"{name}.lora_B.weight"] = 0.1 * torch.randn(module.out_features, 2, generator=generator)
        seeds = range(3 if engine.device.type == "cuda" else 1)  # the third one replays what is captured
        base = [sample(transformer, seed, (16, 16)) for seed in seeds]
        reference.load_lora_adapter(weights, prefix=None)  # into the module of all tests
        try:
            transformer.load_lora_adapter(weights, prefix=None)
            for seed in seeds:
                mine = sample(transformer, seed, (16, 16))
                assert_same_image(mine, sample(reference, seed, (16, 16)), rounding=rounding)
                assert (mine.latents - base[seed].latents).abs().max() > 0.1 * base[seed].latents.std()
        finally:
            reference.unload_lora()
        transformer.unload_lora()
        assert_same_image(sample(transformer, 0, (16, 16)), base[0], rounding=rounding)

    return check


@pytest.mark.long
def test_adapters_in_onnxruntime(
    device: torch.device, onnx_bundle: Path, assert_takes_adapters: Callable[[StepEngine], None]
) -> None:
    import onnxruntime

    if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    manifest = Bundle.open(onnx_bundle).manifest
    family = family_named(manifest.family, manifest.transformer_config)
    assert_takes_adapters(OnnxRuntimeStepEngine(onnx_bundle, family, manifest.dtype.torch, device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device here")
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_adapters_in_plans(
    flavour: Flavour, tmp_path: Path, assert_takes_adapters: Callable[[StepEngine], None]
) -> None:
    if not can_build(flavour):
        pytest.skip(f"{TITLES[flavour]} is not installed, or builds nothing here")
    if flavour == "tensorrt_rtx" and torch.cuda.get_device_capability()[0] == 9:
        pytest.skip("TensorRT-RTX does not run on Hopper")
    targets = (Target.ONNX, Target(flavour))
    out = tmp_path / "bundle"
    sizes = ((64, 64),)  # 16 x 16 latents
    export(ExportConfig(model="sd3-mini", out=out, text_length=48, resolutions=sizes, targets=targets, refittable=True))
    assert_takes_adapters(engine_from_bundle(Bundle.open(out), flavour))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device here")
@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_plans(flavour: Flavour, cuda_graphs: bool, tmp_path: Path, assert_agrees: Callable[..., None]) -> None:
    if not can_build(flavour):
        pytest.skip(f"{TITLES[flavour]} is not installed, or builds nothing here")
    if flavour == "tensorrt_rtx" and torch.cuda.get_device_capability()[0] == 9:
        pytest.skip("TensorRT-RTX does not run on Hopper")
    sizes = ((128, 128), (96, 160))
    out = tmp_path / "bundle"
    targets = (Target.ONNX, Target(flavour))
    export(ExportConfig(model="sd3-mini", out=out, text_length=48, resolutions=sizes, targets=targets))
    bundle = Bundle.open(out)
    engine, pixels = (
        engine_from_bundle(bundle, flavour, cuda_graphs=cuda_graphs),
        bundle.manifest.geometry.pixels_per_latent,
    )
    for height, width in sizes:
        assert_agrees(engine, (height // pixels, width // pixels))
