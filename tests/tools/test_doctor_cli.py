"""`cat-doctor` on the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doctor_findings import SECTIONS, by_topic, findings_of

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.tools import doctor_cli
from cat_pruning.tools.doctor import examine
from cat_pruning.tools.findings import Finding


def run(*arguments: object, python_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = [str(path) for path in (python_path, os.environ.get("PYTHONPATH")) if path]
    return subprocess.run(
        [sys.executable, "-m", "cat_pruning.tools.doctor_cli", *map(str, arguments)],
        env=os.environ | {"COLUMNS": "80", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


def package(directory: Path, name: str, code: str) -> None:
    (directory / name).mkdir()
    (directory / name / "__init__.py").write_text(code)


CHATTER = """
import ctypes, os, sys
print("chatter of Python")
print("chatter of errors", file=sys.stderr)
os.write(1, b"chatter of a descriptor")
ctypes.CDLL(None).printf(b"chatter of C")
"""


def test_a_torch_that_is_broken(tmp_path: Path) -> None:
    package(tmp_path, "torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    result = run(python_path=tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    assert "OSError: libcudart.so.13" in result.stdout
    assert "pip install --force-reinstall torch" in result.stdout
    assert result.stdout.endswith("This machine cannot generate images.\n")


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="C's library has another name")
@pytest.mark.parametrize("name", ["diffusers", "transformers"])
def test_libraries_that_are_broken_and_what_they_print(tmp_path: Path, name: str) -> None:
    """Those that pipelines are made of, and TensorRT; nothing that they print is in the report."""
    package(tmp_path, name, CHATTER + "raise RuntimeError('operator torchvision::nms does not exist')")
    package(tmp_path, "tensorrt", CHATTER + "raise OSError('libnvinfer.so.11: cannot open shared object file')")
    result = run("--json", python_path=tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    report = json.loads(result.stdout)
    machine = {finding["topic"]: finding for finding in report["machine"]}
    assert machine["diffusers"]["status"] == machine["tensorrt"]["status"] == "problem"
    assert "torchvision::nms does not exist" in machine["diffusers"]["text"]
    assert machine["diffusers"]["remedy"] == "pip install --force-reinstall diffusers transformers"
    assert "libnvinfer.so.11: cannot open shared object file" in machine["tensorrt"]["text"]
    assert machine["tensorrt"]["remedy"] == "pip install 'cat-pruning[tensorrt]'"
    assert report["can_generate"] is False


@pytest.mark.parametrize("package", ["accelerate", "onnx_ir", "onnxscript"])
def test_without_the_extra_that_exports(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    report = examine()
    finding = by_topic(report.targets)["onnx"]
    assert finding == Finding(
        "onnx", "problem", f"cat-export needs {package}, not installed here", "pip install 'cat-pruning[export]'"
    )
    assert (report.can_generate, report.engine) == (True, "onnxruntime")


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_the_table_and_the_json_have_the_same(
    mini_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert doctor_cli.main([str(mini_bundle), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert set(fields) == {"version", "bundle_path", "can_generate", "engine", "gpu", *SECTIONS}
    assert fields["bundle_path"] == str(mini_bundle)
    assert fields["can_generate"] is True
    assert doctor_cli.main([str(mini_bundle)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert max(len(line) for line in lines if str(mini_bundle) not in line) <= 80  # a path is never broken
    table = squeezed(captured.out)  # where a line was wrapped, nothing but space may have come
    report = examine(Bundle.open(mini_bundle))
    assert findings_of(report) == [Finding(**finding) for section in SECTIONS for finding in fields[section]]
    for finding in findings_of(report):
        mark = {"ok": "✓", "warning": "!", "problem": "✗"}[finding.status]
        topic = doctor_cli._TOPICS.get(finding.topic, finding.topic) if finding in report.machine else finding.topic
        assert squeezed(mark + topic + finding.text) in table
        assert squeezed(finding.remedy) in table
        if finding.remedy:
            assert table.count(squeezed(f"→ {finding.remedy}")) >= 1


def test_exit_code_of_a_bundle_that_cannot_run(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "bundle"
    shutil.copytree(mini_bundle, copied)
    index = copied / "pipeline" / "model_index.json"
    index.write_bytes(index.read_bytes()[::-1])
    assert doctor_cli.main([str(copied)]) == 1
    assert "cannot generate" in capsys.readouterr().out


def test_bad_input(mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncated = tmp_path / "bundle"
    shutil.copytree(mini_bundle, truncated)
    (truncated / "step.onnx").write_bytes(b"")
    cases = {
        tmp_path / "nowhere": "does not exist",
        tmp_path: "manifest.json is missing",
        truncated: "step.onnx has 0 bytes",
        Path("owner/name"): "those are not looked at here; export it, which checks it, and give the bundle: cat-export",
    }
    for path, said in cases.items():
        assert doctor_cli.main([str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("cat-doctor: ")
        assert captured.err.count("\n") == 1
        assert said in captured.err
    with pytest.raises(SystemExit) as stop:
        doctor_cli.main(["--nonsense"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "cat-doctor: unrecognized arguments: --nonsense; see cat-doctor --help\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        doctor_cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "exit code:" in out
