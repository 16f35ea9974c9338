"""Exports in fp16, which ONNX Runtime computes, and in bf16, which its CPU provider does not."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cat_pruning.dtype import DType
from cat_pruning.exporter.step_graph import export_step_graph, run_step
from cat_pruning.exporter.verify import run_graphs, verify_step_graph
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.step_io import Part

FP32_INPUTS = {"timestep", "guidance", "position", "rotary_cos", "rotary_sin", "keep_indices"}


def exported(transformer: Any, directory: Path, *arguments: Any) -> StepModule:
    step = StepModule(transformer, family_of(transformer))
    export_step_graph(step, directory, *arguments)
    return step


def types_of(directory: Path) -> dict[str, int]:
    """The element types of all inputs."""
    graphs = [onnx.load(directory / part.onnx, load_external_data=False).graph for part in Part]
    return {value.name: value.type.tensor_type.elem_type for graph in graphs for value in graph.input}


@pytest.mark.long
def test_fp16_loads_and_runs(make_tiny: Any, step_inputs: Any, tmp_path: Path) -> None:
    step = exported(make_tiny("sd3.5", num_layers=1).half(), tmp_path)
    for part in Part:
        onnx.checker.check_model(tmp_path / part.onnx, full_check=True)
    sessions = [onnxruntime.InferenceSession(tmp_path / part.onnx, providers=["CPUExecutionProvider"]) for part in Part]
    inputs = step_inputs(step, batch=1, grid=(4, 10), kept=13)
    noise = run_graphs(sessions, {name: tensor.numpy() for name, tensor in inputs.items()})["noise_out"]
    expected = run_step(step, inputs)["noise_out"].float()
    assert noise.dtype == np.float16
    assert np.abs(noise - expected.numpy()).max() / expected.abs().max().item() <= 3e-2
    assert verify_step_graph(step, tmp_path, DType.FP16) <= 3e-2
    assert {name for name, kind in types_of(tmp_path).items() if kind != onnx.TensorProto.FLOAT16} <= FP32_INPUTS


@dataclass
class Exported:
    directory: Path
    parameters: list[weakref.ref[torch.nn.Parameter]]
    progress: list[tuple[int, int]]
    last_weight: np.ndarray[Any, Any]


@pytest.fixture(scope="module", params=["sd3.5", "pixart-alpha", "flux-dev"])
def bf16(request: pytest.FixtureRequest, make_bf16: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An export in bf16, all of whose tensors this process has let go of."""
    transformer = make_bf16(request.param)
    result = Exported(
        tmp_path_factory.mktemp("bf16"),
        [weakref.ref(parameter) for parameter in transformer.parameters()],
        [],
        transformer.proj_out.weight.detach().float().numpy().T,
    )
    exported(transformer, result.directory, lambda *progress: result.progress.append(progress))
    del transformer
    gc.collect()
    return result


def test_the_weights_are_released_after_the_export(bf16: Exported) -> None:
    assert not [parameter for parameter in bf16.parameters if parameter() is not None]


def test_bf16_is_a_valid_model_of_bf16_weights(bf16: Exported) -> None:
    stored = {}
    for part in Part:
        onnx.checker.check_model(bf16.directory / part.onnx, full_check=True)
        stored |= {tensor.name: tensor for tensor in onnx.load(bf16.directory / part.onnx).graph.initializer}
    weights = [tensor for name, tensor in stored.items() if re.search(r"\.(weight|bias)(\.T)?$", name)]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.BFLOAT16}
    weight = onnx.numpy_helper.to_array(stored["transformer.proj_out.weight.T"]).astype(np.float32)
    np.testing.assert_array_equal(weight, bf16.last_weight)
    others = {name for name, kind in types_of(bf16.directory).items() if kind != onnx.TensorProto.BFLOAT16}
    assert {"timestep", "keep_indices"} <= others <= FP32_INPUTS


def test_progress_is_told_weight_by_weight(bf16: Exported) -> None:
    total = bf16.progress[-1][1]
    assert bf16.progress == [(done, total) for done in range(1, total + 1)]
