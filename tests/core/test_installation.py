"""A package that is missing, and a platform that is not ours, are one line."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from cat_pruning import console
from cat_pruning.errors import InstallationError
from cat_pruning.installation import PACKAGES, check_platform, pip_install, require
from cat_pruning.runtime.pipeline import load_pipeline

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a tool's `main`, which must exit with 2 and one line on standard error; returns that line."""

    def run(module: str, *arguments: object) -> str:
        assert import_module(f"cat_pruning.{module}").main(list(map(str, arguments))) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    return run


def names(requirements: list[str], extras: dict[str, list[str]]) -> set[str]:
    """The packages of some requirements as Python imports them, those of our own extras among them."""
    found: set[str] = set()
    for requirement in requirements:
        if requirement.startswith("cat-pruning["):
            for extra in requirement.removeprefix("cat-pruning[").removesuffix("]").split(","):
                found |= names(extras[extra], extras)
        else:
            found.add(re.split(r"[>\[]", requirement)[0].replace("-", "_"))
    return found


def test_what_is_looked_for_is_what_the_extras_install() -> None:
    extras = PROJECT["optional-dependencies"]
    base = names(PROJECT["dependencies"], extras)
    for extra, packages in PACKAGES.items():
        assert set(packages) <= names(extras[extra], extras)
        assert not set(packages) & base
    assert names(extras["rtx"], extras) == names(extras["tensorrt-rtx"], extras) == {"tensorrt_rtx_cu13"}
    # Ray does not go with the versions of constraints.txt.
    every = {package for extra, packages in PACKAGES.items() if extra != "ray" for package in packages}
    assert names(extras["all"], extras) >= every
    assert names(extras["dev"], extras) >= every


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require("this", *(extra for extra in PACKAGES if extra != "ray"))  # which the tests do not install
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InstallationError) as raised:
        require("this", "export", "pictures")
    assert raised.value.problem == "this needs onnxscript, matplotlib, not installed here"
    assert raised.value.remedy == pip_install("export", "pictures") == "pip install 'cat-pruning[export,pictures]'"
    with pytest.raises(InstallationError) as raised:
        require("this", "lora", "pictures")
    assert raised.value.remedy == "pip install 'cat-pruning[pictures]'"


@pytest.mark.parametrize(
    ("module", "arguments", "package", "line"),
    [
        ("exporter.cli", ["--model", "sd3-mini"], "onnxscript",
         "cat-export: cat-export needs onnxscript, not installed here; pip install 'cat-pruning[export]'\n"),
        ("evaluation.cli", ["nowhere", "--out", "out"], "jinja2",
         "cat-eval: cat-eval needs jinja2, not installed here; pip install 'cat-pruning[eval]'\n"),
        ("evaluation.cli", ["nowhere", "--out", "out"], "scipy",
         "cat-eval: cat-eval needs scipy, not installed here; pip install 'cat-pruning[eval]'\n"),
        ("tools.generate_cli", ["nowhere", "a star", "--compare"], "onnx_ir",
         "cat-generate: --compare needs onnx_ir, not installed here; pip install 'cat-pruning[export]'\n"),
        ("tools.generate_cli", ["nowhere", "a star", "--token-map"], "matplotlib",
         "cat-generate: --token-map needs matplotlib, not installed here; pip install 'cat-pruning[pictures]'\n"),
    ],
)  # fmt: skip
def test_a_tool_without_its_extra_says_which(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fails: Fails,
    module: str,
    arguments: list[str],
    package: str,
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert fails(module, *arguments) == line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_another_platform_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], platform: str
) -> None:
    check_platform()
    monkeypatch.setattr(sys, "platform", platform)
    assert console.run("tool", lambda: pytest.fail("it ran")) == 2
    assert capsys.readouterr().err == f"tool: cat-pruning runs on Linux, and this is {platform}; on Windows, take WSL\n"
    with pytest.raises(InstallationError):
        load_pipeline("nowhere")


def test_the_platform_is_declared() -> None:
    assert "Operating System :: POSIX :: Linux" in PROJECT["classifiers"]
