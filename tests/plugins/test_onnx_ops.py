from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from cat_pruning.plugins import onnx_ops
from cat_pruning.plugins.token_ops import token_gather, token_scatter

SIZES = [(1, 1, 1, 1), (2, 16, 5, 8), (3, 40, 40, 3), (2, 33, 1, 64)]
ARGUMENTS = {"TokenGather": ["tokens", "indices"], "TokenScatter": ["tokens", "indices", "rows"]}


def model_of(name: str, index_type: int, element_type: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    """A model of one node, as the exporter writes it."""
    arguments = ARGUMENTS[name]
    node = onnx.helper.make_node(name, arguments, ["out"], domain=onnx_ops.DOMAIN, **onnx_ops.PLUGIN_ATTRIBUTES)
    types = {"tokens": element_type, "indices": index_type, "rows": element_type}
    shapes = {"tokens": ["B", "N", "D"], "indices": ["B", "n"], "rows": ["B", "n", "D"]}
    inputs = [onnx.helper.make_tensor_value_info(name, types[name], shapes[name]) for name in arguments]
    output = onnx.helper.make_tensor_value_info("out", element_type, ["B", None, "D"])
    graph = onnx.helper.make_graph([node], "one", inputs, [output])
    opset = onnx.helper.make_opsetid("", onnx_ops.OPSET_VERSION)
    model = ir.serde.deserialize_model(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10))
    onnx_ops.attach_functions(model)
    return ir.serde.serialize_model(model)


def case(size: tuple[int, int, int, int], index_type: int) -> dict[str, np.ndarray]:
    batch, num_rows, kept, width = size
    random = np.random.default_rng(sum(size))
    dtype = np.int32 if index_type == onnx.TensorProto.INT32 else np.int64
    return {
        "tokens": random.standard_normal((batch, num_rows, width), np.float32),
        "indices": np.stack([random.permutation(num_rows)[:kept] for _ in range(batch)]).astype(dtype),
        "rows": random.standard_normal((batch, kept, width), np.float32),
    }


def runners(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    yield ReferenceEvaluator(model).run(None, feeds)[0]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    yield session.run(None, feeds)[0]


@pytest.mark.parametrize("index_type", [onnx.TensorProto.INT32, onnx.TensorProto.INT64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_function_bodies_equal_the_torch_operators(name: str, size: tuple[int, int, int, int], index_type: int) -> None:
    arrays = case(size, index_type)
    feeds = {argument: arrays[argument] for argument in ARGUMENTS[name]}
    operator = token_gather if name == "TokenGather" else token_scatter
    expected = operator(*map(torch.from_numpy, feeds.values())).numpy()
    for result in runners(model_of(name, index_type), feeds):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("element_type", [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_checker_takes_every_dtype(name: str, element_type: int) -> None:
    onnx.checker.check_model(model_of(name, onnx.TensorProto.INT32, element_type), full_check=True)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_functions_declare_the_attributes_that_nodes_carry(name: str) -> None:
    model = model_of(name, onnx.TensorProto.INT32)
    function = next(function for function in model.functions if function.name == name)
    declared = {a.name: onnx.helper.get_attribute_value(a) for a in function.attribute_proto}
    assert declared == {a.name: onnx.helper.get_attribute_value(a) for a in model.graph.node[0].attribute}
    assert set(declared) == {"plugin_namespace", "plugin_version", "aot"}


def test_schemas_are_registered_once_and_may_be_asked_for_again() -> None:
    assert set(onnx_ops.translation_table()) == {
        torch.ops.cat.token_gather.default,
        torch.ops.cat.token_scatter.default,
    }
    onnx_ops.translation_table()
    for name, arguments in ARGUMENTS.items():
        schema = onnx.defs.get_schema(name, domain=onnx_ops.DOMAIN)
        assert [parameter.name for parameter in schema.inputs] == arguments
