"""Sessions of ONNX Runtime say what goes wrong in their errors only."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cat_pruning.engines.onnxruntime_sessions import ORT_ERRORS, quiet_session, run_quietly

ROOT = Path(__file__).parents[2]


def matmul(operator: str = "MatMul") -> bytes:
    left, right, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in "abc")
    graph = helper.make_graph([helper.make_node(operator, ["a", "b"], ["c"])], "graph", [left, right], [result])
    content: bytes = helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]).SerializeToString()
    return content


def test_what_goes_wrong_is_in_the_error_only(capfd: pytest.CaptureFixture[str]) -> None:
    session = quiet_session(matmul())
    with pytest.raises(ORT_ERRORS, match="dimension mismatch"):
        run_quietly(session, {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)})
    with pytest.raises(ORT_ERRORS, match="NoSuchOperator"):
        quiet_session(matmul("NoSuchOperator"))
    assert capfd.readouterr() == ("", "")


def test_no_other_sessions_are_made() -> None:
    rooms = ("engines", "exporter", "runtime", "tools", "evaluation", "tuning")
    makers = [path for room in rooms for path in (ROOT / room).rglob("*.py") if re.search(
        r"\bInferenceSession\(", path.read_text())]  # fmt: skip
    own = [ROOT / "engines/onnxruntime_sessions.py", ROOT / "exporter/data_loader.py"]  # which is a script in bundles
    assert makers == own
