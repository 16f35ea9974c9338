from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cat_pruning.errors import EngineError
from cat_pruning.plugins import cuda_launch, token_ops
from cat_pruning.plugins.cuda_kernels import Specialization

# What torch would say of the current device and stream; then launches through NVIDIA's bindings into a driver that
# takes what it is given to the kernels as compiled for the host.
WITH_FAKE_DRIVER = """
import contextlib, ctypes, sys
from types import SimpleNamespace
import pytest, torch
from cat_pruning.errors import EngineError
from cat_pruning.plugins import cuda_launch
from cat_pruning.plugins.cuda_kernels import Specialization, compile_ptx
from cat_pruning.plugins.token_ops import token_gather, token_scatter

compile_ptx(Specialization(16, 4))  # NVRTC looks for a driver too, and would take ours
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_device = lambda: 0
stream = SimpleNamespace(cuda_stream=7)
torch.cuda.current_stream = lambda: stream

tokens, rows = torch.randn(2, 40, 24), torch.randn(2, 9, 24)
indices = torch.rand(2, 40).argsort(1)[:, :9].int().contiguous()
assert torch.equal(cuda_launch.gather(tokens, indices), token_gather(tokens, indices))
expected = token_scatter(tokens, indices, rows)
assert cuda_launch.scatter_(tokens, indices, rows) is tokens
assert torch.equal(tokens, expected)
stream.cuda_stream = 8
with pytest.raises(EngineError, match="cuLaunchKernel failed with CUDA_ERROR_INVALID_VALUE"):
    cuda_launch.gather(tokens, indices)
"""


@pytest.mark.long
def test_launches_reach_a_driver_as_the_kernels_declare_them(
    build_host_kernels: Callable[[Specialization, str], Path], tmp_path: Path
) -> None:
    library = tmp_path / "libcuda.so.1"
    library.symlink_to(build_host_kernels(Specialization(16, 4), "fake_driver.cpp"))
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITH_FAKE_DRIVER, str(library)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_without_a_driver_a_launch_says_so() -> None:
    with pytest.raises(EngineError, match="the CUDA driver cannot be called"):
        cuda_launch.gather(torch.zeros(1, 2, 4), torch.zeros(1, 1, dtype=torch.int32))


def test_self_test_wants_a_cuda_device() -> None:
    with pytest.raises(EngineError, match="cannot be tested on cpu; expected a CUDA device"):
        cuda_launch.plugin_self_test(torch.device("cpu"))


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A device that launches what torch computes."""
    cases = cuda_launch.self_test_cases
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a pretended GPU")
    monkeypatch.setattr(cuda_launch, "self_test_cases", lambda device: cases(torch.device("cpu")))
    monkeypatch.setattr(cuda_launch, "gather", token_ops.token_gather)
    monkeypatch.setattr(cuda_launch, "scatter_", token_ops.token_scatter_)
    return monkeypatch


def test_self_test_passes_where_results_are_right(pretended_gpu: pytest.MonkeyPatch) -> None:
    cuda_launch.plugin_self_test(torch.device("cuda"))


@pytest.mark.parametrize("name", ["gather", "scatter_"])
def test_self_test_names_what_differs(pretended_gpu: pytest.MonkeyPatch, name: str) -> None:
    right = getattr(cuda_launch, name)

    def wrong_for_odd_rows(*tensors: Tensor) -> Tensor:
        result: Tensor = right(*tensors)
        if tensors[0].shape[-1] == 1025 and tensors[0].dtype == torch.bfloat16:
            result[-1, -1, -1] += 1
        return result

    pretended_gpu.setattr(cuda_launch, name, wrong_for_odd_rows)
    kernel = {"gather": "token_gather", "scatter_": "token_scatter"}[name]
    with pytest.raises(EngineError, match=rf"{kernel} differs from torch for torch.bfloat16, torch.int32, .*1025\)"):
        cuda_launch.plugin_self_test(torch.device("cuda"))
