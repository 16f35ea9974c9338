from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from cat_pruning.errors import EngineError
from cat_pruning.plugins import onnx_ops, tensorrt_plugin
from cat_pruning.plugins.cuda_kernels import GATHER, LANES, ROWS_PER_BLOCK, SCATTER, Specialization, compile_ptx
from cat_pruning.plugins.cuda_launch import Launch
from cat_pruning.plugins.tensorrt_plugin import compile_kernels, register_token_plugins

DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}
INDEX_DTYPES = {"INT32": torch.int32, "INT64": torch.int64}
SIZES = [(1, 1, 1, 1), (2, 40, 7, 1536), (2, 33, 33, 6), (3, 9, 0, 12), (2, 65, 20, 1025)]  # (B, N, n, D)
KERNELS = {"TokenGather": GATHER, "TokenScatter": SCATTER}
CASES = list(itertools.product(KERNELS, DTYPES, INDEX_DTYPES, SIZES))
Case = tuple[str, str, str, tuple[int, int, int, int]]


def question(name: str, dtype: str, index_dtype: str, size: tuple[int, int, int, int]) -> dict[str, Any]:
    batch, num_tokens, num_kept, width = size
    tokens, indices, rows = [batch, num_tokens, width], [batch, num_kept], [batch, num_kept, width]
    if name == "TokenGather":
        dims, types = [tokens, indices, rows], [dtype, index_dtype, dtype]
    else:
        dims, types = [tokens, indices, rows, tokens], [dtype, index_dtype, dtype, dtype]
    declared = [[-1, *[-1] * (len(shape) - 2), shape[-1]] if len(shape) == 3 else [-1, -1] for shape in dims]
    return {"name": name, "declared": declared, "dims": dims, "types": types}


DYNAMIC_WIDTH = {**question(*CASES[0]), "declared": [[-1, -1, -1], [-1, -1], [-1, -1, -1]]}
WRONG = [
    {**question(*CASES[0]), "types": ["FP8", "INT32", "FP8"]},
    {**question(*CASES[0]), "types": ["FLOAT", "UINT8", "FLOAT"]},
]


@pytest.fixture(scope="module")
def probed(tensorrt_stubs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What NVIDIA's front end makes of our plugins, for every case."""
    questions = [*(question(*case) for case in CASES), DYNAMIC_WIDTH, *WRONG]
    script, answers = Path(__file__).parent / "tensorrt_probe.py", tmp_path_factory.mktemp("probe") / "answers.json"
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(tensorrt_stubs), str(answers)],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(answers.read_text())  # type: ignore[no-any-return]


def test_both_plugins_are_registered_once_under_the_names_that_nodes_carry(probed: dict[str, Any]) -> None:
    attributes = onnx_ops.PLUGIN_ATTRIBUTES
    expected = [[name, attributes["plugin_namespace"], attributes["plugin_version"]] for name in KERNELS]
    assert sorted(probed["registered"]) == expected


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_declarations_as_the_builder_sees_them(probed: dict[str, Any], index: int) -> None:
    name, dtype, index_dtype, (batch, num_tokens, num_kept, width) = CASES[index]
    answer = probed["answers"][index]
    asked = question(*CASES[index])
    assert "error" not in answer, answer
    assert answer["output_type"] == dtype
    assert answer["output_shape"] == asked["dims"][-1]
    assert answer["aliased_input"] == (0 if name == "TokenScatter" else -1)
    assert answer["formats"] == [[dtype, "LINEAR"] for dtype in asked["types"]]
    assert answer["tactics"] == []
    blocks = batch * num_kept // ROWS_PER_BLOCK + 1
    assert answer["launch"] == {
        **{"grid_x": blocks, "grid_y": 1, "grid_z": 1},
        **{"block_x": LANES, "block_y": ROWS_PER_BLOCK, "block_z": 1, "shared_mem": 0},
    }
    element_bytes = DTYPES[dtype].itemsize
    specialization = Specialization.of(element_bytes, width, INDEX_DTYPES[index_dtype].itemsize)
    assert answer["kernel"] == specialization.entry(KERNELS[name])
    assert answer["ptx"] == compile_ptx(specialization)
    assert answer["scalars"] == [batch, num_tokens, num_kept, width * element_bytes // specialization.word_bytes]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_what_the_builder_would_launch_computes_the_onnx_function(
    probed: dict[str, Any], run_on_host: Callable[[Launch], None], index: int
) -> None:
    name, dtype_name, index_name, (batch, num_tokens, num_kept, width) = CASES[index]
    answer, dtype = probed["answers"][index], DTYPES[dtype_name]
    random = np.random.default_rng(index)
    kept = [random.permutation(num_tokens)[:num_kept] for _ in range(batch)]
    indices = torch.from_numpy(np.stack(kept)).to(INDEX_DTYPES[index_name])
    tokens, rows = (
        torch.from_numpy(random.standard_normal((batch, count, width), np.float32)).to(dtype)
        for count in (num_tokens, num_kept)
    )
    inputs = [tokens, indices] if name == "TokenGather" else [tokens, indices, rows]
    expected = onnx_function(name, inputs)
    output = torch.empty_like(rows) if name == "TokenGather" else tokens  # aliased
    launch = Launch(
        KERNELS[name],
        Specialization.of(dtype.itemsize, width, indices.itemsize),
        answer["launch"]["grid_x"],
        (*[tensor.data_ptr() for tensor in inputs], *answer["scalars"], output.data_ptr()),
    )
    run_on_host(launch)
    assert torch.equal(output, expected)


def onnx_function(name: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    """The node's function body by ONNX Runtime, bits in and bits out: its bf16 and fp16 travel as fp32, exactly."""
    arguments = ["tokens", "indices", "rows"][: len(inputs)]
    arrays = {
        key: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for key, tensor in zip(arguments, inputs, strict=True)
    }
    node = onnx.helper.make_node(name, arguments, ["out"], domain=onnx_ops.DOMAIN, **onnx_ops.PLUGIN_ATTRIBUTES)
    values = [
        onnx.helper.make_tensor_value_info(key, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for key, array in arrays.items()
    ]
    output = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [None] * 3)
    graph = onnx.helper.make_graph([node], "one", values, [output])
    opset = onnx.helper.make_opsetid("", onnx_ops.OPSET_VERSION)
    model = ir.serde.deserialize_model(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10))
    onnx_ops.attach_functions(model)
    serialized = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, arrays)[0]).to(inputs[0].dtype)


def test_a_width_known_at_run_time_is_moved_by_the_element(probed: dict[str, Any]) -> None:
    answer = probed["answers"][len(CASES)]
    assert answer["kernel"] == Specialization(4, 4).entry(GATHER)
    assert answer["scalars"] == [1, 1, 1, 1]


def test_other_dtypes_are_refused_by_name(probed: dict[str, Any]) -> None:
    tokens, indices = [answer["error"] for answer in probed["answers"][-2:]]
    assert tokens.startswith("EngineError: a token plugin got FP8, expected one of FLOAT, HALF, BF16")
    assert indices.startswith("EngineError: a token plugin got UINT8, expected one of INT32, INT64")


def test_what_callbacks_raise_is_kept(probed: dict[str, Any]) -> None:
    """TensorRT passes none of it on."""
    assert [words.partition(",")[0] for words in probed["callback_errors"]] == [
        "EngineError: a token plugin got FP8",
        "EngineError: a token plugin got UINT8",
    ]


def tensor(dtype: str, *shape: int) -> Any:
    return SimpleNamespace(dtype=SimpleNamespace(name=dtype), shape=shape)


def test_kernels_are_compiled_before_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Specialization] = []
    monkeypatch.setattr(tensorrt_plugin, "compile_ptx", compiled.append)
    compile_kernels(tensor("BF16", -1, -1, 1536), tensor("INT32", -1, -1))
    compile_kernels(tensor("FLOAT", -1, -1, 3), tensor("INT64", -1, -1))
    assert compiled == [Specialization.of(2, 1536, 4), Specialization.of(4, 3, 8)]
    with pytest.raises(EngineError, match="a token plugin got FP8"):
        compile_kernels(tensor("FP8", -1, -1, 1536), tensor("INT32", -1, -1))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (SimpleNamespace(__name__="tensorrt_rtx"), "TensorRT-RTX takes no plugins, expected TensorRT"),
        (SimpleNamespace(__name__="tensorrt", __version__="10.7.0"), "10.7.0 has no ahead-of-time plugins"),
        (SimpleNamespace(__name__="nothing_of_the_kind", QuickPluginCreationRequest=None), "cannot be imported"),
    ],
)
def test_modules_without_such_plugins_are_refused(module: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        register_token_plugins(module)


def test_tensorrt_rtx_itself_is_refused() -> None:
    module: ModuleType = pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match="expected TensorRT"):
        register_token_plugins(module)
