"""The CUDA kernels' source compiled as C++ and run on the host."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cat_pruning.plugins import cuda_kernels
from cat_pruning.plugins.cuda_kernels import LANES, ROWS_PER_BLOCK, Specialization
from cat_pruning.plugins.cuda_launch import Launch

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fsanitize=alignment", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas"]


@pytest.fixture(scope="session")
def build_host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Specialization, str], Path]:
    """The shared library of a specialization, built from a C++ file of this folder that includes the kernels."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here to compile the kernels for the host")
    folder = tmp_path_factory.mktemp("host_kernels")
    source = folder / "token_rows.cu"
    source.write_text(cuda_kernels.kernel_source())

    @functools.cache
    def build(specialization: Specialization, wrapper: str) -> Path:
        library = folder / f"{wrapper}.{specialization.word_bytes}.{specialization.index_bytes}.so"
        macros = [f"-D{macro}" for macro in (*specialization.macros, f'TOKEN_SOURCE="{source}"')]
        command = ["g++", *FLAGS, *macros, str(HERE / wrapper), "-o", str(library)]
        if wrapper == "fake_driver.cpp":
            command.append("-Wl,-soname,libcuda.so.1")  # what NVIDIA's bindings look for
        subprocess.run(command, check=True)
        return library

    return build


@pytest.fixture(scope="session")
def run_on_host(build_host_kernels: Callable[[Specialization, str], Path]) -> Callable[[Launch], None]:
    """Run a launch over tensors in host memory."""

    def run(launch: Launch) -> None:
        library = ctypes.CDLL(str(build_host_kernels(launch.specialization, "host_cuda.cpp")))
        values = [kind(value) for kind, value in zip(launch.parameter_types, launch.parameters, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        status = library.host_launch(
            launch.specialization.entry(launch.kernel).encode(), launch.blocks, LANES, ROWS_PER_BLOCK, pointers
        )
        assert status == 0, {1: "misaligned access", 2: f"no kernel {launch.kernel}"}[status]

    return run
