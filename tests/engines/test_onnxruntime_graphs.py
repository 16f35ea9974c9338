"""Options of ONNX Runtime's sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cat_pruning.engines import onnxruntime_graphs
from cat_pruning.engines.onnxruntime_graphs import EXACT_PRODUCTS, load_graph, saturates
from cat_pruning.engines.onnxruntime_sessions import ORT_ERRORS
from cat_pruning.engines.side_stream import SideStream


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "expected"),
    [
        ("x86_64", "flags : fpu sse2 avx2 avx512_vnni amx_int8", False),
        ("x86_64", "flags : fpu sse2 avx2 avx_vnni", False),
        ("x86_64", "flags : fpu sse2 avx2 avx512f avx512bw", True),
        ("AMD64", "", True),  # Windows does not say
        ("aarch64", "Features : fp asimd", False),
        ("arm64", "", False),
    ],
)
def test_processors_whose_products_saturate(machine: str, cpuinfo: str, expected: bool) -> None:
    assert saturates(machine, cpuinfo) is expected


@pytest.mark.parametrize("here", [True, False])
def test_exact_products_are_asked_for_where_they_saturate(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def session(path: Path, providers: Any, options: Any, **more: Any) -> Any:
        try:
            asked.append(options.get_session_config_entry(EXACT_PRODUCTS) == "1")
        except ORT_ERRORS:  # it has none
            asked.append(False)
        return type("Session", (), {})()

    monkeypatch.setattr(onnxruntime_graphs, "quiet_session", session)
    monkeypatch.setattr(onnxruntime_graphs, "_saturates_here", lambda: here)
    device = torch.device("cpu")
    load_graph(Path("step.onnx"), device, SideStream(device))
    assert asked == [here]
