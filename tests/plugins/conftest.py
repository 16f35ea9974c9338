"""The CUDA kernels' source compiled as C++ and run on the host, and stubs that NVIDIA's TensorRT bindings load with."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from cat_pruning.plugins import cuda_kernels
from cat_pruning.plugins.cuda_kernels import LANES, ROWS_PER_BLOCK, Variant
from cat_pruning.plugins.cuda_launch import Launch

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fsanitize=alignment", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas"]


@pytest.fixture(scope="session")
def build_host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant, str], Path]:
    """The shared library of a variant, built from a C++ file of this folder that includes the kernels."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here to compile the kernels for the host")
    folder = tmp_path_factory.mktemp("host_kernels")
    source = folder / "token_rows.cu"
    source.write_text(cuda_kernels.kernel_source())

    @functools.cache
    def build(variant: Variant, wrapper: str) -> Path:
        library = folder / f"{wrapper}.{variant.word_bytes}.{variant.index_bytes}.so"
        macros = [f"-D{macro}" for macro in (*variant.macros, f'TOKEN_SOURCE="{source}"')]
        command = ["g++", *FLAGS, *macros, str(HERE / wrapper), "-o", str(library)]
        if wrapper == "fake_driver.cpp":
            command.append("-Wl,-soname,libcuda.so.1")  # what NVIDIA's bindings look for
        subprocess.run(command, check=True)
        return library

    return build


@pytest.fixture(scope="session")
def run_on_host(build_host_kernels: Callable[[Variant, str], Path]) -> Callable[[Launch], None]:
    """Run a launch over tensors in host memory."""

    def run(launch: Launch) -> None:
        library = ctypes.CDLL(str(build_host_kernels(launch.variant, "host_cuda.cpp")))
        values = [kind(value) for kind, value in zip(launch.parameter_types, launch.parameters, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        status = library.host_launch(
            launch.variant.entry(launch.kernel).encode(), launch.blocks, LANES, ROWS_PER_BLOCK, pointers
        )
        assert status == 0, {1: "misaligned access", 2: f"no kernel {launch.kernel}"}[status]

    return run


# What the bindings want of the builder's libraries and the lean runtime has not got.
STUBS = {
    "libnvinfer.so.11": ["createInferBuilder_INTERNAL", "getBuilderPluginRegistry"],
    "libnvonnxparser.so.11": [
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ],
    "libnvinfer_plugin.so.11": ["initLibNvInferPlugins"],
}
# The package that comes with the builder, and only passes its bindings on.
FRONT_END = {
    "__init__.py": "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n",
    "plugin/__init__.py": "from tensorrt_bindings.plugin import *\n",
}


@pytest.fixture(scope="session")
def tensorrt_stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package `tensorrt`, and shared libraries in place of the builder's, over the lean runtime."""
    if find_spec("tensorrt_bindings") is None or (lean := find_spec("tensorrt_lean_libs")) is None:
        pytest.skip("TensorRT's bindings and lean runtime are not installed (the extra 'dev', on Linux)")
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc here to build stubs of the builder's libraries")
    assert lean.origin is not None
    folder, runtime = tmp_path_factory.mktemp("tensorrt_stubs"), Path(lean.origin).parent
    for library, symbols in STUBS.items():
        source = folder / f"{library}.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        command = ["gcc", "-shared", "-fPIC", str(source), "-o", str(folder / library), f"-Wl,-soname,{library}"]
        command += ["-Wl,--no-as-needed", f"-L{runtime}", "-l:libnvinfer_lean.so.11", f"-Wl,-rpath,{runtime}"]
        subprocess.run(command, check=True)
    (folder / "tensorrt" / "plugin").mkdir(parents=True)
    for name, text in FRONT_END.items():
        (folder / "tensorrt" / name).write_text(text)
    return folder
