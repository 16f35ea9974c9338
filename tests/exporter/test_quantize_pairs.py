"""Products between pairs of QuantizeLinear and DequantizeLinear: their arithmetic, and who takes them."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cat_pruning.dtype import DType
from cat_pruning.engines.builder.build import build_plan, can_build, plan_specs
from cat_pruning.errors import EngineError, SettingsError
from cat_pruning.exporter.calibration import watched
from cat_pruning.exporter.importer_rules import importer_findings
from cat_pruning.exporter.macs import count_macs
from cat_pruning.exporter.quantize import quantize_step, quantized_products
from cat_pruning.exporter.quantize_pairs import write_pairs
from cat_pruning.exporter.step_graph import example_inputs, run_step
from cat_pruning.exporter.verify import verify_step_graph
from cat_pruning.names import Quantization
from cat_pruning.step_io import Part

STEP = Part.STEP.onnx
CALIBRATED = [Quantization.INT8_CALIBRATED, Quantization.FP8]
ROWS, INPUTS = 5, 16
OUTPUTS = {"wide": 8, "narrow": 3}  # products of the same rows
Floats = NDArray[np.float32]


def two_products(path: Path, dtype: Any = np.float32) -> dict[str, Floats]:
    """Write a graph of two products of the same rows; its weights, whose channels differ in size."""
    generator = np.random.default_rng(0)
    weights = {
        name: (generator.normal(size=(INPUTS, width)) * np.geomspace(0.1, 10, INPUTS)[:, None]).astype(dtype)
        for name, width in OUTPUTS.items()
    }
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", f"{name}.weight.T"], [name], f"product_{name}") for name in weights],
        "step",
        [helper.make_tensor_value_info("x", kind, ["rows", INPUTS])],
        [helper.make_tensor_value_info(name, kind, ["rows", width]) for name, width in OUTPUTS.items()],
        [numpy_helper.from_array(value, f"{name}.weight.T") for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, path)
    return {name: value.astype(np.float32) for name, value in weights.items()}


def paired(folder: Path, quantization: Quantization, reached: Floats, dtype: Any = np.float32) -> Path:
    folder.mkdir(parents=True)
    two_products(folder / "before.onnx", dtype)
    (folder / "out").mkdir()
    out = folder / "out" / STEP
    ranges = {f"{name}.weight.T": reached for name in OUTPUTS}
    write_pairs(folder / "before.onnx", out, [f"product_{name}" for name in OUTPUTS], ranges, quantization)
    return out


def in_eight_bits(values: Floats, scale: Any, quantization: Quantization) -> Floats:
    """The equation of the module's docstring, in numpy; fp8 by its own nearest values."""
    if quantization is Quantization.INT8_CALIBRATED:
        return np.clip(np.rint(values / scale), -128, 127) * scale  # type: ignore[no-any-return]
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    every = np.unique(every[np.isfinite(every)])
    clipped = np.clip(values / scale, every[0], every[-1])
    right = np.searchsorted(every, clipped).clip(1, len(every) - 1)
    low, high = every[right - 1], every[right]
    return np.where(clipped - low < high - clipped, low, high) * scale  # type: ignore[no-any-return]


@pytest.mark.parametrize("quantization", CALIBRATED)
def test_the_equation(quantization: Quantization, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    x = (generator.normal(size=(ROWS, INPUTS)) * np.geomspace(5, 0.2, INPUTS)).astype(np.float32)
    reached = np.abs(x).max(axis=0) / np.float32(1.25)  # some of the rows are beyond, which are taken to the ends
    weights = two_products(tmp_path / "step.onnx")
    path = paired(tmp_path / "graphs", quantization, reached)
    session = onnxruntime.InferenceSession(path)
    results = dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"x": x}), strict=True))
    smoothing = np.ones(INPUTS, np.float32)
    largest, scale_of = 448.0, float(2.0 ** np.ceil(np.log2(reached.max() / 448)))
    if quantization is Quantization.INT8_CALIBRATED:
        smoothing = np.sqrt(reached / np.abs(np.hstack(list(weights.values()))).max(axis=1))
        largest, scale_of = 127.0, float((reached / smoothing).max() / 127)
    for name, result in results.items():
        smoothed = weights[name] * smoothing[:, None]
        scales = np.abs(smoothed).max(axis=0) / largest
        rows, columns = (
            in_eight_bits(values, scale, quantization)
            for values, scale in ((x / smoothing, scale_of), (smoothed, scales))
        )
        expected = rows @ columns
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        plain = np.linalg.norm(x @ weights[name] - expected) / np.linalg.norm(expected)
        assert plain > 5e-3  # so that a graph that quantizes nothing fails


def test_rows_and_weights_are_smoothed_by_the_same_numbers(tmp_path: Path) -> None:
    """In 16 bits too, where the graph's are rounded: the weights are missed by half a step at most."""
    reached = np.geomspace(5, 0.2, INPUTS).astype(np.float32)
    weights = two_products(tmp_path / "step.onnx", ml_dtypes.bfloat16)
    model = onnx.load(paired(tmp_path / "graphs", Quantization.INT8_CALIBRATED, reached, ml_dtypes.bfloat16))
    found = {each.name: numpy_helper.to_array(each).astype(np.float32) for each in model.graph.initializer}
    inverse = found["wide.weight.T.smoothing"][:, None]
    for name, expected in weights.items():
        step = found[f"{name}.weight.T.scale"]
        error = np.abs(inverse * found[f"{name}.weight.T"] * step - expected) / (inverse * step)
        assert 0.3 < error.max() < 0.51


@pytest.mark.parametrize("quantization", CALIBRATED)
def test_two_products_of_the_same_weights(quantization: Quantization, tmp_path: Path) -> None:
    """Of other rows, as of a layer that two blocks have: each has weights and scales of its own."""
    weights = np.random.default_rng(0).normal(size=(INPUTS, INPUTS)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", [each, "shared.weight.T"], [f"{each}_out"], each) for each in "xy"],
        "step",
        [helper.make_tensor_value_info(each, TensorProto.FLOAT, ["rows", INPUTS]) for each in "xy"],
        [helper.make_tensor_value_info(f"{each}_out", TensorProto.FLOAT, ["rows", INPUTS]) for each in "xy"],
        [numpy_helper.from_array(weights, "shared.weight.T")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), tmp_path / STEP)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / STEP
    write_pairs(tmp_path / STEP, out, "xy", {"shared.weight.T": np.full(INPUTS, 3, np.float32)}, quantization)
    rows = np.random.default_rng(1).uniform(-3, 3, (ROWS, INPUTS)).astype(np.float32)
    results = onnxruntime.InferenceSession(out).run(None, {"x": rows, "y": -rows})
    for result, given in zip(results, (rows, -rows), strict=True):
        expected = given @ weights
        assert 1e-3 < np.abs(result - expected).max() / np.abs(expected).max() < 5e-2


def test_a_channel_that_nothing_reaches(tmp_path: Path) -> None:
    """Neither in the images nor in the weights: no scale is zero, and no result is NaN."""
    for quantization in CALIBRATED:
        path = paired(tmp_path / quantization, quantization, np.zeros(INPUTS, np.float32))
        results = onnxruntime.InferenceSession(path).run(None, {"x": np.zeros((2, INPUTS), np.float32)})
        assert all((result == 0).all() for result in results)


def test_a_layer_that_no_image_used(tmp_path: Path) -> None:
    two_products(tmp_path / "before.onnx")
    (tmp_path / "out").mkdir()
    with pytest.raises(EngineError, match=r"calibration: no image of it used narrow\.weight\.T; leave it unquantized"):
        write_pairs(
            tmp_path / "before.onnx",
            tmp_path / "out" / STEP,
            ["product_wide", "product_narrow"],
            {"wide.weight.T": np.ones(INPUTS, np.float32)},
            Quantization.FP8,
        )


@pytest.mark.skipif(not can_build("tensorrt_rtx"), reason="TensorRT-RTX is not installed; install '.[tensorrt-rtx]'")
@pytest.mark.parametrize("quantization", CALIBRATED)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_real_tensorrt_rtx_builds_them(quantization: Quantization, dtype: Any, tmp_path: Path) -> None:
    """In eight bits: the plan has the weights' own bytes."""
    path = paired(tmp_path / "graphs", quantization, np.ones(INPUTS, np.float32), dtype)
    spec = plan_specs("tensorrt_rtx", fp8=quantization is Quantization.FP8)[-1]
    profile = {"x": ((1, INPUTS), (ROWS, INPUTS), (ROWS, INPUTS))}
    build_plan(spec, path, tmp_path / "step.plan", [profile])
    assert (tmp_path / "step.plan").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["sd3.5", "pixart", "flux-dev"])
@pytest.mark.parametrize("quantization", CALIBRATED)
def test_a_step(quantization: Quantization, kind: str, export_tiny: Any, tmp_path: Path) -> None:
    """Every layer of it has a range; full and pruned steps are near torch's, and their MACs are the same."""
    export = export_tiny(kind)
    step, folder = export.step, tmp_path / "graphs"
    shutil.copytree(export.directory, folder, copy_function=shutil.copyfile)
    dims = step.family.dims((7, 10), batch=3, text_length=9, num_kept=70)
    with watched(step.transformer) as largest:
        for seed in (1, 3):
            run_step(step, example_inputs(step, dims, seed=seed))
    quantize_step(folder, quantization, ranges=largest)
    nodes = onnx.load(folder / STEP, load_external_data=False).graph.node
    count = len(quantized_products(onnx.load(export.directory / STEP, load_external_data=False).graph))
    assert Counter(node.op_type for node in nodes)["QuantizeLinear"] == count  # in fp32 each has its own
    assert (folder / f"{STEP}.data").stat().st_size < 0.6 * (export.directory / f"{STEP}.data").stat().st_size
    error = verify_step_graph(step, folder, DType.FP32, 2e-1)
    assert error > 1e-3
    assert importer_findings(folder / STEP) == []
    shapes = {name: dims.named(spec.shape) for name, spec in export.graphs[Part.STEP].inputs.items()}
    assert count_macs(folder / STEP, shapes) == count_macs(export.directory / STEP, shapes)
    if quantization is Quantization.INT8_CALIBRATED:
        assert fused_products(folder / STEP, tmp_path) == count


def fused_products(path: Path, folder: Path) -> int:
    """How many products ONNX Runtime makes of integers."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3  # it warns that the file is for this machine only
    onnxruntime.InferenceSession(path, options)
    model = onnx.load(folder / "optimised.onnx", load_external_data=False)
    return sum(node.op_type == "MatMulIntegerToFloat" for node in model.graph.node)


def test_layers_that_stay_as_they_are(export_tiny: Any, tmp_path: Path) -> None:
    graph = onnx.load(export_tiny("sd3").directory / STEP, load_external_data=False).graph
    every, some = quantized_products(graph), quantized_products(graph, ["transformer_blocks.0.*", "*.ff.net.2"])
    left = {node.input[1].removeprefix("transformer.") for node in graph.node if node.name in set(every) - set(some)}
    assert left
    assert all(name.startswith("transformer_blocks.0.") or ".ff.net.2." in name for name in left)
    kept = [node.input[1] for node in graph.node if node.name in some]
    assert kept
    assert not any("transformer_blocks.0." in name or ".ff.net.2." in name for name in kept)
    with pytest.raises(SettingsError, match=r"--unquantized norm\*: no layer that would be quantized is called so; "):
        quantized_products(graph, ["norm*"])
    with pytest.raises(
        SettingsError, match=r"--unquantized \* \*\.ff\.\*: no layer is left to be quantized; leave out "
    ):
        quantized_products(graph, ["*", "*.ff.*"])


def test_sixteen_bits_share_the_rows_pair(tmp_path: Path) -> None:
    """And have their scales in the same dtype, which TensorRT-RTX asks for."""
    path = paired(tmp_path / "graphs", Quantization.FP8, np.ones(INPUTS, np.float32), ml_dtypes.bfloat16)
    model = onnx.load(path)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == 1
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {kind for name, kind in kinds.items() if name.endswith("scale")} == {TensorProto.BFLOAT16}
    assert kinds["wide.weight.T"] == TensorProto.FLOAT8E4M3FN
