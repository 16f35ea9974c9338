"""What NVIDIA's own Python bindings of TensorRT load with on a machine without its builder, which is not on PyPI."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

# What the bindings want of the builder's libraries and the lean runtime has not got. Nothing here is ever called.
SYMBOLS = {
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


def build_stubs(folder: Path) -> None:
    """Put into `folder` the package `tensorrt`, and shared libraries in place of the builder's."""
    if find_spec("tensorrt_bindings") is None or (lean := find_spec("tensorrt_lean_libs")) is None:
        pytest.skip("TensorRT's bindings and lean runtime are not installed (the extra 'dev', on Linux)")
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc here to build stubs of the builder's libraries")
    assert lean.origin is not None
    runtime = Path(lean.origin).parent
    for library, symbols in SYMBOLS.items():
        source = folder / f"{library}.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        command = ["gcc", "-shared", "-fPIC", str(source), "-o", str(folder / library), f"-Wl,-soname,{library}"]
        command += ["-Wl,--no-as-needed", f"-L{runtime}", "-l:libnvinfer_lean.so.11", f"-Wl,-rpath,{runtime}"]
        subprocess.run(command, check=True)
    (folder / "tensorrt" / "plugin").mkdir(parents=True)
    for name, text in FRONT_END.items():
        (folder / "tensorrt" / name).write_text(text)
