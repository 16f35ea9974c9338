"""The files of an export under ONNX Runtime, against torch and against the step before it was split; how they look."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cat_pruning.dtype import DType
from cat_pruning.errors import EngineError
from cat_pruning.exporter.step_graph import run_step
from cat_pruning.exporter.verify import run_graphs, verify_step_graph
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.plugins.onnx_ops import DOMAIN, OPSET_VERSION, PLUGIN_ATTRIBUTES
from cat_pruning.step_io import Part

PARTS = pytest.mark.parametrize("part", list(Part))


@functools.cache
def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def deviation(result: Any, expected: Any) -> float:
    return float(np.abs(result - expected).max() / np.abs(expected).max())


# Exported with batch 2, 6 x 5 tokens, 7 text tokens, 11 kept.
# Odd and even numbers of token rows and columns: SD3's position table is cropped around its centre.
@pytest.mark.parametrize(
    ("batch", "grid", "kept", "text"),
    [
        (1, (4, 10), 1, 7),
        (3, (10, 3), 13, 4),
        (1, (8, 8), None, 9),
        (3, (12, 12), None, 1),
        (2, (1, 1), 1, 1),
        (2, (24, 24), 570, 5),
        (1, (3, 11), 33, 2),
    ],
)
def test_onnx_runtime_equals_torch_and_the_unsplit_step_at_other_shapes(
    tiny_export: Any, step_inputs: Any, batch: int, grid: tuple[int, int], kept: int | None, text: int
) -> None:
    inputs = step_inputs(tiny_export.step, batch=batch, grid=grid, kept=kept, text=text)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    results = run_graphs([session(tiny_export.directory / part.onnx) for part in Part], arrays)
    whole = run_graphs([session(tiny_export.directory / "whole.onnx")], arrays)
    for name, expected in run_step(tiny_export.step, inputs).items():
        assert deviation(results[name], expected.numpy()) <= 1e-4, name
        assert deviation(results[name], whole[name]) <= 1e-5, name


def test_one_run_of_the_timesteps_serves_every_step(tiny_export: Any, step_inputs: Any) -> None:
    """Rows of three steps in one batch are the rows of three runs."""
    timestep = session(tiny_export.directory / Part.TIMESTEP.onnx)
    names = [value.name for value in timestep.get_inputs()]
    steps = [step_inputs(tiny_export.step, batch=2, grid=(3, 5), seed=seed) for seed in (1, 2, 3)]
    gates = {"layer_gates": steps[0]["layer_gates"].numpy()} if "layer_gates" in names else {}  # one for all
    feeds = [{name: inputs[name].numpy() for name in names} | gates for inputs in steps]
    together = {name: np.concatenate([feed[name] for feed in feeds]) for name in names}
    packed = timestep.run(None, together | gates)
    singly = [timestep.run(None, feed) for feed in feeds]
    assert all(deviation(a, b) > 0.01 for a, b in zip(singly[0], singly[1], strict=True))
    for index, pack in enumerate(packed):
        np.testing.assert_allclose(pack, np.concatenate([each[index] for each in singly], axis=1), rtol=1e-5, atol=1e-6)


def test_verify_reports_the_error_of_a_good_export(tiny_export: Any) -> None:
    assert 0 < verify_step_graph(tiny_export.step, tiny_export.directory, DType.FP32) <= 1e-4


def test_verify_refuses_an_export_of_other_weights(tiny_export: Any, make_tiny: Any, tmp_path: Path) -> None:
    transformer = make_tiny(tiny_export.kind)
    with torch.no_grad():
        transformer.proj_out.weight *= 1.01
    step = StepModule(transformer, family_of(transformer))
    with pytest.raises(EngineError, match=r"--verify: noise_out of a step with 21 of 70 tokens is off torch's by"):
        verify_step_graph(step, tiny_export.directory, DType.FP32)
    with pytest.raises(EngineError, match=r"--verify: ONNX Runtime cannot load prompt\.onnx"):
        verify_step_graph(step, tmp_path, DType.FP32)


# ------------------------------------------------------------------ the files


@PARTS
def test_the_checker_passes_with_and_without_shape_inference(tiny_export: Any, part: Part) -> None:
    onnx.checker.check_model(tiny_export.directory / part.onnx, full_check=True)


def test_token_operators_are_nodes_of_our_domain_in_the_step_alone(tiny_export: Any) -> None:
    graph = onnx.load(tiny_export.directory / "step.onnx", load_external_data=False)
    nodes = [node for node in graph.graph.node if node.domain == DOMAIN]
    caches = tiny_export.step.family.caches()
    # The gather of the tokens; FLUX gathers rotary embeddings by a standard operator. Scatters: every key and value,
    # and the noise.
    expected = {"TokenGather": 1, "TokenScatter": 2 * len(caches) + 1}
    assert Counter(node.op_type for node in nodes) == expected
    for node in nodes:
        assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {
            key: value.encode() if isinstance(value, str) else value for key, value in PLUGIN_ATTRIBUTES.items()
        }
    assert {node.domain for node in graph.graph.node} == {"", DOMAIN}
    for part in (Part.PROMPT, Part.TIMESTEP):
        other = onnx.load(tiny_export.directory / part.onnx, load_external_data=False)
        assert {node.domain for node in other.graph.node} == {""}


@PARTS
def test_functions_and_opsets(tiny_export: Any, part: Part) -> None:
    graph = onnx.load(tiny_export.directory / part.onnx, load_external_data=False)
    assert {entry.domain: entry.version for entry in graph.opset_import} == {"": OPSET_VERSION, DOMAIN: 1}
    functions = {function.name: function for function in graph.functions}
    assert set(functions) == {"TokenGather", "TokenScatter"}
    for function in functions.values():
        assert function.domain == DOMAIN
        assert {attribute.name for attribute in function.attribute_proto} == set(PLUGIN_ATTRIBUTES)
        assert {node.domain for node in function.node} == {""}


def test_attention_is_one_operator_each(tiny_export: Any) -> None:
    graph = onnx.load(tiny_export.directory / "step.onnx", load_external_data=False)
    config = tiny_export.step.transformer.config
    cached = len(tiny_export.step.family.caches())
    to_the_text = config["num_layers"] if tiny_export.step.family.name == "pixart" else 0
    assert Counter(node.op_type for node in graph.graph.node)["Attention"] == cached + to_the_text


@PARTS
def test_the_file_tells_nothing_of_the_machine_that_made_it(tiny_export: Any, part: Part) -> None:
    path = tiny_export.directory / part.onnx
    graph, strings = onnx.load(path, load_external_data=False), path.read_bytes()
    for trace in (b"site-packages", b"stack_trace", b".py", b"Traceback", str(Path.cwd()).encode(), b"/tmp/"):
        assert trace not in strings
    metadata = [graph, graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.value_info, *graph.functions]
    assert not [entry for each in metadata for entry in each.metadata_props]
    assert graph.doc_string == graph.graph.doc_string == ""
    assert not any(node.doc_string for node in graph.graph.node)
    locations = {entry.value for tensor in graph.graph.initializer for entry in tensor.external_data
                 if entry.key == "location"}  # fmt: skip
    assert locations == {f"{part.onnx}.data"}


def test_weights_keep_their_names_and_values_and_lie_in_one_file_each(tiny_export: Any) -> None:
    stored: dict[str, Any] = {}
    for part in Part:
        for tensor in onnx.load(tiny_export.directory / part.onnx).graph.initializer:
            assert tensor.name not in stored or not tensor.name.startswith("transformer."), f"{tensor.name} is in two"
            stored[tensor.name] = onnx.numpy_helper.to_array(tensor)
    found = set()
    for name, parameter in tiny_export.step.transformer.named_parameters():
        (key,) = [key for key in (f"transformer.{name}", f"transformer.{name}.T") if key in stored]
        value = parameter.detach().numpy()
        np.testing.assert_array_equal(stored[key], value.T if key.endswith(".T") else value)
        found.add(key)
    rest = set(stored) - found  # constants of the graph, and SD3's position table
    assert not [name for name in rest if re.search(r"\.(weight|bias)(\.T)?$", name)]
    assert sum(stored[name].size for name in rest if "pos_embed" not in name) < 1000


def test_the_files_hold_the_weights_once(tiny_export: Any) -> None:
    transformer = tiny_export.step.transformer
    tensors = (*transformer.parameters(), *transformer.buffers())
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    sizes = [(tiny_export.directory / f"{part.onnx}.data").stat().st_size for part in Part]
    assert sum(sizes) <= num_bytes * 1.1 + 3 * 64 * 1024
    assert all((tiny_export.directory / part.onnx).stat().st_size < 200_000 for part in Part)


@pytest.mark.parametrize("kind", ["sd3"])
def test_example_inputs_are_valid_and_the_same_for_the_same_seed(tiny_transformer: Any, step_inputs: Any) -> None:
    step = StepModule(tiny_transformer, family_of(tiny_transformer))
    inputs = step_inputs(step, batch=3, grid=(4, 10), kept=13, seed=5)
    again = step_inputs(step, batch=3, grid=(4, 10), kept=13, seed=5)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    for row in inputs["keep_indices"]:
        assert len(set(row.tolist())) == 13
        assert 0 <= row.min() <= row.max() < 40
    assert inputs["keep_indices"].dtype == torch.int32
