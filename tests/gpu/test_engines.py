"""ONNX Runtime and the plans on a GPU against the torch engine on the CPU. On the CPU, the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cat_pruning.engines.build import can_build
from cat_pruning.engines.bundle import Bundle
from cat_pruning.engines.records import Flavour
from cat_pruning.engines.tensorrt_library import TARGETS, TITLES
from cat_pruning.exporter.export import ExportConfig, Target, export
from cat_pruning.exporter.families import family_named
from cat_pruning.runtime.engine_choice import FLAVOURS, engine_from_bundle
from cat_pruning.runtime.onnxruntime_engine import OnnxRuntimeStepEngine


def test_onnxruntime(device: torch.device, onnx_bundle: Path, assert_agrees: Callable[..., None]) -> None:
    import onnxruntime

    if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    manifest = Bundle.open(onnx_bundle).manifest
    family, config = family_named(manifest.family), manifest.transformer_config
    engine = OnnxRuntimeStepEngine(onnx_bundle, family, config, manifest.dtype.torch, device)
    assert_agrees(engine)
    assert_agrees(engine, (12, 20))


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
    targets = (Target.ONNX, Target(TARGETS[flavour]))
    export(ExportConfig(model="sd3-mini", out=out, text_length=48, resolutions=sizes, targets=targets))
    bundle = Bundle.open(out)
    engine, pixels = (
        engine_from_bundle(bundle, flavour, cuda_graphs=cuda_graphs),
        bundle.manifest.geometry.pixels_per_latent,
    )
    for height, width in sizes:
        assert_agrees(engine, (height // pixels, width // pixels))
