"""What `import cat_pruning` gives and costs; in fresh interpreters, where nothing is imported yet."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cat_pruning

# Like an installation without the optional packages.
_IMPORT_ALL = """
import importlib, pkgutil, sys

for name in ("tensorrt", "tensorrt_rtx"):
    sys.modules[name] = None  # as Python itself marks what cannot be imported
import pytest

import cat_pruning
names = {module.name for module in pkgutil.walk_packages(cat_pruning.__path__, "cat_pruning.")}
# For Ray, and they say so where it is not installed.
names -= {"cat_pruning.serving.ray_app", "cat_pruning.evaluation.ray_pool"}
for name in names:
    importlib.import_module(name)
print(*names)
"""


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_import_costs_nothing() -> None:
    heavy = ("torch", "diffusers", "transformers", "numpy", "onnx", "onnxruntime", "pydantic", "matplotlib", "PIL")
    assert python(f"import sys, cat_pruning; print([n for n in {heavy} if n in sys.modules])").strip() == "[]"


def test_the_settings_and_errors_need_no_torch() -> None:
    code = "import sys; from cat_pruning import PruneSettings; import cat_pruning.errors; print('torch' in sys.modules)"
    assert python(code).strip() == "False"


def test_the_tools_refuse_before_they_import_torch() -> None:
    code = (
        "import sys; from cat_pruning.tools import generate_cli as cli\n"
        "try: cli.main(['nowhere', 'a star', '--steps', '0'])\n"
        "except SystemExit as error: print(error.code, 'torch' in sys.modules)"
    )
    assert python(code).strip() == "2 False"


def test_the_public_names() -> None:
    assert sorted(cat_pruning.__all__) == ["CatTransformer", "PruneSettings", "Schedule", "load_pipeline"]
    assert set(dir(cat_pruning)) == {*cat_pruning.__all__, "__version__"}
    for name in cat_pruning.__all__:
        assert getattr(cat_pruning, name).__name__ == name
    assert not hasattr(cat_pruning, "Sampling")


@pytest.mark.long
def test_every_module_imports_without_the_optional_packages() -> None:
    names = python(_IMPORT_ALL).split()
    assert {"cat_pruning.runtime.transformer", "cat_pruning.exporter.cli", "cat_pruning.engines.builder.build"} <= set(
        names
    )
    assert len(names) > 30, names
