"""Steps in integers: what is quantized, what it errs, and what must not break on such a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.checkpoints.checkpoint import find_checkpoint
from cat_pruning.dtype import DType
from cat_pruning.errors import EngineError
from cat_pruning.exporter import memory
from cat_pruning.exporter.macs import count_macs
from cat_pruning.exporter.quantize import quantize_step, quantized_products
from cat_pruning.exporter.verify import QUANTIZED_TOLERANCE, verify_step_graph
from cat_pruning.names import Quantization
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part
from cat_pruning.tools import bundle_cli
from cat_pruning.tools.generate import GenerateConfig, generate

CatExport = Callable[..., tuple[int, str, list[str]]]
STEP = Part.STEP.onnx
FULL, EVERY_TOKEN = {"full_steps": 5}, {"full_steps": 2, "keep_ratio": 1.0}
OPERATORS = {
    Quantization.INT8: "MatMulInteger",
    Quantization.WEIGHTS_INT8: "MatMulNBits",
    Quantization.WEIGHTS_INT4: "MatMulNBits",
}


def products(directory: Path) -> dict[str, list[str]]:
    """The names of the weights of each kind of product in a step."""
    graph = onnx.load(directory / STEP, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    found: dict[str, list[str]] = {}
    for node in graph.node:
        if "Mat" in node.op_type and node.input[1] in weights:
            found.setdefault(node.op_type, []).append(node.input[1])
    return found


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("sd3", ["proj_out"]), ("pixart", ["proj_out"]), ("flux-dev", ["x_embedder", "proj_out"])],
)
def test_the_ends_are_kept(kind: str, kept: list[str], export_tiny: Any) -> None:
    """Found by where they stand: a block of FLUX's has a proj_out too."""
    graph = onnx.load(export_tiny(kind).directory / STEP, load_external_data=False).graph
    every, chosen = (quantized_products(graph, keep_ends=keep) for keep in (False, True))
    left = [node.input[1] for node in graph.node if node.name in set(every) - set(chosen)]
    assert left == [f"transformer.{name}.weight.T" for name in kept]
    assert len(every) == sum(node.op_type == "MatMul" for node in graph.node)


@pytest.mark.parametrize("quantization", list(OPERATORS))
def test_a_quantized_step(quantization: Quantization, export_tiny: Any, tmp_path: Path) -> None:
    export = export_tiny("flux-dev")  # whose patch embedding is a matrix product
    folder = tmp_path / "graphs"
    shutil.copytree(export.directory, folder, copy_function=shutil.copyfile)
    quantize_step(folder, quantization)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in export.directory.iterdir())
    before, after = (products(place) for place in (export.directory, folder))
    assert [name.split(".")[1] for name in after.pop("MatMul")] == ["x_embedder", "proj_out"]
    assert {name: len(found) for name, found in after.items()} == {OPERATORS[quantization]: len(before["MatMul"]) - 2}
    # Full and pruned, at two batches. It does err: what is compared is the quantized step.
    error = verify_step_graph(export.step, folder, DType.FP32, QUANTIZED_TOLERANCE[quantization])
    assert error > 1e-3
    with pytest.raises(EngineError, match=r"is off torch's by .*; at most 1e-03 is expected of its quantization; "):
        verify_step_graph(export.step, folder, DType.FP32, 1e-3)
    for num_kept in (9, 30):
        dims = export.step.family.dims((6, 5), batch=2, text_length=11, num_kept=num_kept)
        shapes = {name: dims.named(spec.shape) for name, spec in export.graphs[Part.STEP].inputs.items()}
        assert count_macs(folder / STEP, shapes) == count_macs(export.directory / STEP, shapes)


def test_too_little_memory(
    cat_export: CatExport, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantizer holds all weights, and more than once, where an export to ONNX holds them once at most."""
    parameters = find_checkpoint(str(tiny_checkpoint)).num_parameters
    monkeypatch.setattr(memory, "total_memory", lambda: (2 << 30) + 8 * parameters)
    arguments = ("--model", tiny_checkpoint, "--quantize", "int8", "--out", tmp_path / "bundle")
    code, printed, errors = cat_export(*arguments)
    assert (code, printed, len(errors)) == (2, "", 1)
    assert " of memory to be exported, and this machine has 2 GiB" in errors[0]


def test_an_export(cat_export: CatExport, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    code, _, errors = cat_export("--model", tiny_checkpoint, "--weights-only", "int8", "--verify", "--out", out)
    assert (code, errors) == (0, [])
    bundle = Bundle.open(out)
    bundle.verify_graphs()
    assert bundle.manifest.quantization is Quantization.WEIGHTS_INT8
    assert set(products(out)) == {"MatMul", "MatMulNBits"}
    assert " --weights-only int8 " in bundle.export_command()
    assert not bundle.manifest.plans


@pytest.mark.long
def test_images(quantized_bundle: Bundle, mini_bundle: Path) -> None:
    """Full steps, pruned ones, and all tokens on pruned steps: near those of fp32, and not they."""
    text = "a large red circle left of a small blue star on a plain black background"
    config = GenerateConfig(prompts=(text,), height=64, width=64, steps=5, guidance_scale=3.0)
    pipes = [load_pipeline(path, "onnxruntime") for path in (mini_bundle, quantized_bundle.path)]
    for changes in (FULL, {"full_steps": 2}, EVERY_TOKEN):
        settings = PruneSettings(num_clusters=6).replace(**changes)
        made = [generate(pipe, settings, config).images[0].tobytes() for pipe in pipes]
        expected, image = (torch.frombuffer(bytearray(each), dtype=torch.uint8).float() for each in made)
        # Of 255; a pruned step chooses some other tokens, which is most of its difference here (3.7 of 0.6 otherwise).
        assert 0 < (image - expected).abs().mean() < (2 if changes in (FULL, EVERY_TOKEN) else 8)


def test_adapters_are_refused(quantized_bundle: Bundle) -> None:
    pipe = load_pipeline(quantized_bundle.path, "onnxruntime")
    name = "transformer.transformer_blocks.0.attn.to_q"
    adapter = {f"{name}.lora_A.weight": torch.ones(2, 256), f"{name}.lora_B.weight": torch.ones(256, 2)}
    with pytest.raises(EngineError) as caught:
        pipe.load_lora_weights(adapter)
    assert "is in int8, which no adapter can be added to" in caught.value.problem
    assert caught.value.remedy.startswith("fuse the adapter in an export: cat-export --model sd3-mini ")
    assert " --quantize int8 " in caught.value.remedy


def test_no_plans_are_added(quantized_bundle: Bundle, cat_export: CatExport) -> None:
    code, printed, errors = cat_export("--add-plans", quantized_bundle.path, "--target", "tensorrt_rtx")
    assert (code, printed, len(errors)) == (2, "", 1)
    assert "sd3-mini is in int8, and no plans are built from it; export one without quantization" in errors[0]


def test_it_is_shown(quantized_bundle: Bundle, mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundle_cli.main(["inspect", str(quantized_bundle.path)]) == 0
    assert " in fp32, its step in int8, exported from " in " ".join(capsys.readouterr().out.split())
    assert bundle_cli.main(["diff", "--json", str(mini_bundle), str(quantized_bundle.path)]) == 1
    found = {
        each["name"]: (each["first"], each["second"]) for each in json.loads(capsys.readouterr().out)["differences"]
    }
    assert found["quantization"] == (None, "int8")
