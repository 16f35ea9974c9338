from __future__ import annotations

import gc
import re
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cat_pruning.exporter.families import FAMILIES
from cat_pruning.exporter.interception import StepModule
from cat_pruning.exporter.step_graph import export_step_graph, run_step
from cat_pruning.plugins.onnx_ops import DOMAIN, OPSET_VERSION, PLUGIN_ATTRIBUTES
from cat_pruning.step_io import SYMBOLIC, output_names


@pytest.fixture(scope="module")
def graph(tiny_onnx: Path) -> onnx.ModelProto:
    return onnx.load(tiny_onnx)


@pytest.fixture(scope="module")
def session(tiny_onnx: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(tiny_onnx, providers=["CPUExecutionProvider"])


def declared(values: Any) -> dict[str, tuple[int | str, ...]]:
    return {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in values
    }


def test_the_checker_passes_with_and_without_shape_inference(tiny_onnx: Path) -> None:
    onnx.checker.check_model(tiny_onnx, full_check=True)


def test_inputs_and_outputs_are_named_and_shaped_as_step_io_says(tiny_step: StepModule, graph: onnx.ModelProto) -> None:
    expected = tiny_step.family.step_shapes(tiny_step.transformer.config, SYMBOLIC)
    inputs, outputs = declared(graph.graph.input), declared(graph.graph.output)
    assert list(inputs) == list(expected)
    assert inputs == expected
    assert list(outputs) == output_names(2)
    assert outputs == {name: expected[name.removesuffix("_out")] for name in outputs}


def test_token_operators_are_nodes_of_our_domain(graph: onnx.ModelProto) -> None:
    nodes = [node for node in graph.graph.node if node.domain == DOMAIN]
    # one gather after the embedding; key and value of two layers and the noise are scattered
    assert Counter(node.op_type for node in nodes) == {"TokenGather": 1, "TokenScatter": 5}
    for node in nodes:
        assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {
            key: value.encode() if isinstance(value, str) else value for key, value in PLUGIN_ATTRIBUTES.items()
        }
    assert {node.domain for node in graph.graph.node} == {"", DOMAIN}
    assert {entry.domain: entry.version for entry in graph.opset_import} == {"": OPSET_VERSION, DOMAIN: 1}
    functions = {function.name: function for function in graph.functions}
    assert set(functions) == {"TokenGather", "TokenScatter"}
    for function in functions.values():
        assert function.domain == DOMAIN
        assert {attribute.name for attribute in function.attribute_proto} == set(PLUGIN_ATTRIBUTES)
        assert {node.domain for node in function.node} == {""}


def test_attention_is_one_operator_per_layer(graph: onnx.ModelProto) -> None:
    assert Counter(node.op_type for node in graph.graph.node)["Attention"] == 2


def test_the_file_tells_nothing_of_the_machine_that_made_it(tiny_onnx: Path, graph: onnx.ModelProto) -> None:
    strings = tiny_onnx.read_bytes()
    for trace in (b"site-packages", b"stack_trace", b".py", b"Traceback", str(Path.cwd()).encode(), b"/tmp/"):
        assert trace not in strings
    metadata = [graph, graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.value_info, *graph.functions]
    assert not [entry for part in metadata for entry in part.metadata_props]
    assert graph.doc_string == graph.graph.doc_string == ""
    assert not any(node.doc_string for node in graph.graph.node)
    locations = {entry.value for tensor in graph.graph.initializer for entry in tensor.external_data
                 if entry.key == "location"}  # fmt: skip
    assert locations <= {"step.onnx.data"}


def test_weights_keep_their_names_and_values(tiny_step: StepModule, tiny_onnx: Path) -> None:
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(tiny_onnx).graph.initializer}
    found = set()
    for name, parameter in tiny_step.transformer.named_parameters():
        key = next(key for key in (f"transformer.{name}", f"transformer.{name}.T") if key in stored)
        value = parameter.detach().numpy()
        np.testing.assert_array_equal(stored[key], value.T if key.endswith(".T") else value)
        found.add(key)
    rest = set(stored) - found  # constants of the graph, and the position table
    assert not [name for name in rest if re.search(r"\.(weight|bias)(\.T)?$", name)]
    assert sum(stored[name].size for name in rest if "pos_embed" not in name) < 1000


def test_the_file_holds_the_weights_once(tiny_step: StepModule, tiny_onnx: Path) -> None:
    tensors = (*tiny_step.transformer.parameters(), *tiny_step.transformer.buffers())
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert tiny_onnx.with_name("step.onnx.data").stat().st_size <= num_bytes * 1.1 + 64 * 1024
    assert tiny_onnx.stat().st_size < 200_000


# Exported with batch 2, 12 x 10 latents, 7 text tokens, 11 kept.
# Odd and even numbers of token rows and columns: the position table is cropped around its centre.
@pytest.mark.parametrize(
    ("batch", "size", "kept", "text"),
    [
        (1, (8, 20), 1, 7),
        (3, (20, 6), 13, 4),
        (1, (16, 16), None, 9),
        (3, (24, 24), None, 1),
        (2, (2, 2), 1, 1),
        (2, (48, 48), 570, 5),
        (1, (6, 22), 33, 2),
    ],
)
def test_onnx_runtime_equals_torch_at_other_shapes(
    tiny_step: StepModule, session: Any, step_inputs: Any, batch: int, size: tuple[int, int], kept: Any, text: int
) -> None:
    inputs = step_inputs(tiny_step, batch=batch, size=size, kept=kept, text=text)
    results = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    for (name, expected), result in zip(run_step(tiny_step, inputs).items(), results, strict=True):
        error = np.abs(result - expected.numpy()).max() / expected.abs().max().item()
        assert error <= 1e-4, name


def test_sd35_dual_attention_and_norms_of_queries_and_keys(
    make_tiny_sd3: Any, step_inputs: Any, tmp_path: Path
) -> None:
    step = StepModule(make_tiny_sd3(dual_attention_layers=(0,), qk_norm="rms_norm"), FAMILIES[0])
    export_step_graph(step, tmp_path / "step.onnx")
    onnx.checker.check_model(tmp_path / "step.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    inputs = step_inputs(step, batch=3, size=(8, 20), kept=13)
    results = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    for expected, result in zip(run_step(step, inputs).values(), results, strict=True):
        assert np.abs(result - expected.numpy()).max() / expected.abs().max().item() <= 1e-4


def test_fp16_loads_and_runs(make_tiny_sd3: Any, step_inputs: Any, tmp_path: Path) -> None:
    step = StepModule(make_tiny_sd3().half(), FAMILIES[0])
    export_step_graph(step, tmp_path / "step.onnx")
    onnx.checker.check_model(tmp_path / "step.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    inputs = step_inputs(step, batch=1, size=(8, 20), kept=13)
    noise = session.run(["noise_out"], {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    expected = run_step(step, inputs)["noise_out"]
    assert noise.dtype == np.float16
    assert np.abs(noise - expected.numpy()).max() / expected.abs().max().item() <= 3e-2


@dataclass
class Exported:
    path: Path
    parameters: list[weakref.ref[torch.nn.Parameter]]
    progress: list[tuple[int, int]]
    last_weight: np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def bf16(make_tiny_sd3: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An export in bf16, all of whose tensors this process has let go of."""
    step = StepModule(make_tiny_sd3().bfloat16(), FAMILIES[0])
    exported = Exported(
        tmp_path_factory.mktemp("bf16") / "step.onnx",
        [weakref.ref(parameter) for parameter in step.transformer.parameters()],
        [],
        step.transformer.proj_out.weight.detach().float().numpy().T,
    )
    export_step_graph(step, exported.path, lambda *progress: exported.progress.append(progress))
    del step
    gc.collect()
    return exported


def test_the_weights_are_released_after_the_export(bf16: Exported) -> None:
    assert not [parameter for parameter in bf16.parameters if parameter() is not None]


def test_bf16_is_a_valid_model_of_bf16_weights(bf16: Exported) -> None:
    onnx.checker.check_model(bf16.path, full_check=True)
    stored = {tensor.name: tensor for tensor in onnx.load(bf16.path).graph.initializer}
    weights = [tensor for name, tensor in stored.items() if re.search(r"\.(weight|bias)(\.T)?$", name)]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.BFLOAT16}
    weight = onnx.numpy_helper.to_array(stored["transformer.proj_out.weight.T"]).astype(np.float32)
    np.testing.assert_array_equal(weight, bf16.last_weight)


def test_progress_is_told_weight_by_weight(bf16: Exported) -> None:
    total = bf16.progress[-1][1]
    assert bf16.progress == [(done, total) for done in range(1, total + 1)]


def test_example_inputs_are_valid_and_the_same_for_the_same_seed(tiny_step: StepModule, step_inputs: Any) -> None:
    inputs = step_inputs(tiny_step, batch=3, size=(8, 20), kept=13, seed=5)
    again = step_inputs(tiny_step, batch=3, size=(8, 20), kept=13, seed=5)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    for row in inputs["keep_indices"]:
        assert len(set(row.tolist())) == 13
        assert 0 <= row.min() <= row.max() < 40
    assert inputs["keep_indices"].dtype == torch.int32
