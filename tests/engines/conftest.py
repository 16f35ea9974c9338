"""The API of the real TensorRT, whose builder is not on PyPI: its bindings, loaded over libraries that do nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# What the bindings link to and the lean runtime does not have. Nothing here is ever called.
_STUBS = {
    "libnvinfer.so.11": "void *createInferBuilder_INTERNAL(void) { return 0; }"
    " void *getBuilderPluginRegistry(void) { return 0; }",
    "libnvonnxparser.so.11": "void *createNvOnnxParser_INTERNAL(void) { return 0; }"
    " void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; } int getNvOnnxParserVersion(void) { return 0; }",
    "libnvinfer_plugin.so.11": "int initLibNvInferPlugins(void) { return 1; }",
}


@pytest.fixture(scope="session")
def python_with_bindings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Runs a program that may import `tensorrt_bindings`, and returns what it prints."""
    lean = importlib.util.find_spec("tensorrt_lean_libs")
    if lean is None or lean.origin is None or importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("TensorRT's bindings are not installed; pip install '.[dev]' on Linux")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc, to stand in for TensorRT's libraries")
    libraries = Path(lean.origin).parent
    stubs = tmp_path_factory.mktemp("stubs")
    for name, source in _STUBS.items():
        (stubs / "stub.c").write_text(source)
        runtime = [str(libraries / "libnvinfer_lean.so.11"), f"-Wl,-rpath,{libraries}"] if "infer.so" in name else []
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-Wl,--no-as-needed", str(stubs / "stub.c")]
        subprocess.run([*command, *runtime, "-o", str(stubs / name)], check=True)

    def run(program: str) -> str:
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"LD_LIBRARY_PATH": str(stubs)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
