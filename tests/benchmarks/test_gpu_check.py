"""`make gpu-check` without a GPU: its refusal, and its way with stages that fail, hang, or lack something."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_gpu
import check_engine
import gpu_check
import gpu_stages
import pytest
import torch
from gpu_stages import Stage
from source_tree import ROOT, source_tree

from cat_pruning.dtype import DType
from cat_pruning.errors import EngineError
from cat_pruning.exporter.export import ExportConfig
from cat_pruning.names import Target

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
GPU = {"name": "NVIDIA Test 100"}


@NO_GPU
def test_the_benchmarks_without_a_gpu_say_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert bench_gpu.main(["--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "needs an NVIDIA GPU" in said.err
    assert not out.exists()


@pytest.mark.long
@NO_GPU
def test_make_without_a_gpu_says_so_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-s", "gpu-check", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"OUT": str(out)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert len(said) == 1
    assert "gpu_check needs an NVIDIA GPU" in said[0]
    assert list(out.iterdir()) == []


def test_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "is_there", lambda module: False)
    assert gpu_check.main([]) == 2
    assert "torch is not installed" in capsys.readouterr().err


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs stages as on a machine with a GPU: the exit code, and what was written."""
    monkeypatch.setattr(gpu_check, "describe_gpu", lambda: GPU)

    def run(stages: list[Stage] | None, *arguments: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "gpu.json"
        code = gpu_check.main(["--out", str(out), *arguments], stages)
        return code, json.loads(out.read_text())

    return run


def stage(name: str, code: str, seconds: int = 20, needs: tuple[str, ...] = ()) -> Stage:
    return Stage(name, ("-c", code, "{out}"), needs, seconds)


NUMBERS = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"ms\": 1}'); "


def test_stages_do_not_stop_each_other(check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code, report = check(
        [
            stage("good", NUMBERS),
            stage("bad", NUMBERS + "raise SystemExit('TensorRT-RTX: no such card')"),
            stage("lacking", NUMBERS, needs=("json", "no_such_module", "no.such")),
            stage("slow", NUMBERS + child, seconds=5),
            stage("crashing", "import os; os.abort()"),
            stage("silent", "pass"),
            stage("last", NUMBERS),
        ]
    )
    outcomes = {name: result["outcome"] for name, result in report["stages"].items()}
    assert code == 1
    assert outcomes == {
        "good": "ok",
        "bad": "failed",
        "lacking": "skipped",
        "slow": "failed",
        "crashing": "failed",
        "silent": "failed",
        "last": "ok",
    }
    stages = report["stages"]
    assert stages["good"]["numbers"] == stages["bad"]["numbers"] == stages["slow"]["numbers"] == {"ms": 1}
    assert stages["bad"]["message"] == "TensorRT-RTX: no such card"
    assert stages["lacking"]["message"] == "no_such_module, no.such not installed"
    assert stages["slow"]["message"] == "stopped after 5 seconds"
    assert stages["slow"]["seconds"] < 15  # the child with the pipe did not keep it
    assert stages["silent"]["message"] == "it wrote nothing"
    assert report["gpu"] == GPU
    assert report["machine"]["torch"]
    assert "bad: failed, TensorRT-RTX: no such card" in capsys.readouterr().out


def test_the_file_is_there_after_every_stage(check: Any, tmp_path: Path) -> None:
    look = f"import json; assert list(json.load(open({str(tmp_path / 'gpu.json')!r}))['stages']) == ['first']; "
    code, report = check([stage("first", NUMBERS), stage("second", look + NUMBERS)])
    assert code == 0, report


def test_the_time_is_up(check: Any) -> None:
    _, report = check([stage("good", NUMBERS)], "--minutes", "0.05")
    assert report["stages"]["good"] == {"outcome": "skipped", "message": "the time is up"}


def test_stages_by_name(check: Any) -> None:
    """By any word of theirs."""
    named = [stage("steps loops sd3", NUMBERS), stage("steps pixart", NUMBERS)]
    for only, expected in (("loops", ["steps loops sd3"]), ("steps", ["steps loops sd3", "steps pixart"])):
        _, report = check(named, "--only", only)
        assert list(report["stages"]) == expected


def test_parts_of_the_stages(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "run", lambda stage, environment, left, log: {"outcome": "ok", "left": left})
    _, first = check(None, "--part", "1")
    _, second = check(None, "--part", "2", "--minutes", "3")
    _, all_of_them = check(None)
    assert next(iter(first["stages"])) == "tests"
    assert next(iter(second["stages"])) == "fast sd3"
    in_parts = {*first["stages"], *second["stages"]}
    assert len(in_parts) == len(first["stages"]) + len(second["stages"])
    assert set(all_of_them["stages"]) - in_parts >= {"tensorrt", "tensorrt_rtx", "autotune sd3"}
    lefts = [round(next(iter(each["stages"].values()))["left"]) for each in (first, second, all_of_them)]
    assert lefts == [gpu_check.PART_MINUTES * 60, 180, gpu_check.MINUTES * 60]


def test_the_report_goes_where_it_is_fetched_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert gpu_check.default_out("NVIDIA H200", None) == gpu_check.RESULTS / "gpu-nvidia-h200.json"
    monkeypatch.setenv("OUT", "/somewhere")
    assert gpu_check.default_out("NVIDIA H200", 2) == Path("/somewhere/gpu-nvidia-h200-part2.json")


def test_what_the_stages_said_is_in_one_log(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LOG_BYTES", 10)
    for _ in range(2):  # the second run's own
        check([stage("one", NUMBERS + "print('x' * 100 + 'a last word')"), stage("two", "raise SystemExit('refused')")])
    assert (tmp_path / "gpu.log").read_text().split() == [
        *("=====", "one", "=====", "last", "word"),
        *("=====", "two", "=====", "refused"),
    ]


def test_the_gpu_tests_results_by_name(check: Any, tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'not alike'\n"
        "@pytest.mark.skipif(True, reason='no TensorRT')\n"
        "def test_lacking(): pass\n"
    )
    tests = Stage("tests", gpu_stages._tests("--noconftest", str(file)), (), 60, numbers=gpu_stages.test_results)
    code, report = check([tests])
    numbers = report["stages"]["tests"]["numbers"]
    assert code == 1
    assert numbers["passed"] == 1
    assert list(numbers["failed"]) == ["test_some::test_bad"]
    assert "not alike" in numbers["failed"]["test_some::test_bad"]
    assert list(numbers["skipped"].values()) == ["no TensorRT"]


def test_every_stage_is_a_command_that_exists() -> None:
    for compiled in (False, True):
        names = [each.name for each in gpu_stages.stages(compiled)]
        assert len(set(names)) == len(names)
        for each in gpu_stages.stages(compiled):
            assert "{out}" in each.command
            script = Path(each.command[0])
            if script.name == "bench_gpu.py":
                arguments = bench_gpu._parser().parse_args(each.command[1:])
                assert arguments.compiled == compiled
                assert arguments.measurement
                # The ones without a model are named without one, and the others run one: the two would be two.
                assert arguments.model or set(arguments.measurement) <= set(bench_gpu.WITHOUT_MODEL)
            elif script.name == "check_engine.py":
                assert each.command[1] in check_engine.ENGINES
            else:
                assert (ROOT / each.command[-1]).exists()


def test_every_measurement_is_in_a_stage() -> None:
    commands = [each.command for each in gpu_stages.stages()]
    assert set(bench_gpu.MEASUREMENTS) <= {word for command in commands for word in command}


def test_an_engine_that_cannot_be_built_is_told_in_its_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"

    def refuse(config: Any) -> None:
        raise EngineError("TensorRT-RTX 1.7: no such card")

    monkeypatch.setattr(check_engine, "export", refuse)
    monkeypatch.setattr(check_engine, "has_fp8", lambda: True)
    monkeypatch.setattr(check_engine, "check_operators", lambda engine, result: None)
    assert check_engine.main(["tensorrt_rtx", "--out", str(out)]) == 1
    assert capsys.readouterr().err.endswith("EngineError: TensorRT-RTX 1.7: no such card\n")
    error = {"error": "EngineError: TensorRT-RTX 1.7: no such card"}
    names = ["bf16", "bf16, int8-calibrated", "bf16, fp8", "fp16", "fp32"]
    assert json.loads(out.read_text()) == dict.fromkeys(names, error)


def test_no_model_is_run_where_an_operator_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    right = {"operator": "TokenGather", "dtype": "torch.float32", "size": [2, 3, 1, 6], "problems": []}
    wrong = {**right, "problems": ["16 bytes around out were written to", "3 of 6 rows are not torch's"]}
    specs = [SimpleNamespace()]
    monkeypatch.setattr(check_engine, "plan_specs", lambda engine, token_ops: specs if token_ops == "plugin" else [])
    monkeypatch.setattr(check_engine, "check_token_engines", lambda spec, folder, device: [right, wrong])
    assert check_engine.main(["tensorrt", "--out", str(out)]) == 1
    assert capsys.readouterr().err.endswith(
        "1 of 2 engines of one token operator are wrong; the first, TokenGather of torch.float32 at [2, 3, 1, 6]: "
        "16 bytes around out were written to; 3 of 6 rows are not torch's\n"
    )
    assert json.loads(out.read_text()) == {"operators": [right, wrong]}


def test_stages_of_engines_have_time_and_say_what_they_need() -> None:
    by_name = {each.name: each for each in gpu_check.stages()}
    assert all(by_name[name].seconds >= 600 for name in ("tensorrt", "tensorrt_rtx"))
    assert "cuda.bindings" in by_name["tensorrt"].needs


@pytest.mark.long
def test_an_engine_beside_the_torch_engine(mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime on the CPU in the place of a GPU's plans; the export is the fixture's, the image a small one."""
    configs: list[ExportConfig] = []

    def exported(config: ExportConfig) -> None:
        configs.append(config)
        shutil.copytree(mini_bundle, config.out, copy_function=os.link)

    monkeypatch.setattr(check_engine, "export", exported)
    monkeypatch.setattr(check_engine, "SIZE", 64)
    monkeypatch.setattr(check_engine, "STEPS", 12)
    out = tmp_path / "out.json"
    assert check_engine.main(["onnxruntime", "--out", str(out)]) == 0
    (config,) = configs
    assert (config.model, config.dtype, config.text_length) == ("sd3-mini", DType.FP32, 48)
    assert (config.resolutions, config.targets) == (((64, 64),), (Target.ONNX,))
    result = json.loads(out.read_text())["fp32"]
    for name in ("unpruned", "pruned"):
        assert result[name]["largest_difference"] < 1e-3
        assert result[name]["tokens_that_differ"] == 0
        assert result[name]["finite"]


@pytest.mark.long
def test_a_bare_checkout(tmp_path: Path) -> None:
    """The package from a tree of links, which may be there already; with its data, and no other names."""
    for _ in range(2):
        tree = source_tree(tmp_path / "tree")
    assert [path.name for path in tree.iterdir()] == ["cat_pruning"]
    code = (
        "import cat_pruning; print(cat_pruning.__file__);"
        "from cat_pruning.checkpoints.published import published_models; print(*published_models());"
        "from cat_pruning.models import miniatures; print(*miniatures());"
        "import cat_pruning.runtime.selection.selection, cat_pruning.plugins.cuda_launch"
    )
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    file, models, small = done.stdout.splitlines()
    assert Path(file).is_relative_to(tree)
    assert "sd3" in models.split()
    assert "sd3-mini" in small.split()
