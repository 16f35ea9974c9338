"""What `cat-doctor` finds on this machine, and where libraries are broken."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
from doctor_findings import by_topic, changed, needs_rtx, no_gpu, statuses

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.schema import PipelineSpec, Source
from cat_pruning.dtype import DType
from cat_pruning.engines import gpu
from cat_pruning.engines.tensorrt_library import tensorrt_library
from cat_pruning.exporter.export import default_targets
from cat_pruning.names import ENGINES, Target
from cat_pruning.tools.doctor import examine
from cat_pruning.tools.findings import Finding

# This machine


@no_gpu
@needs_rtx
def test_this_machine() -> None:
    report = examine()
    machine = by_topic(report.machine)
    assert machine["torch"].text.startswith(torch.__version__)
    assert machine["gpu"].status != "ok"
    assert machine["gpu"].text.startswith("none that torch can use (")
    assert machine["gpu"].remedy
    assert machine["onnxruntime"] == Finding("onnxruntime", "ok", machine["onnxruntime"].text)
    assert onnxruntime.__version__ in machine["onnxruntime"].text
    assert machine["tensorrt_rtx"] == Finding("tensorrt_rtx", "ok", tensorrt_library("tensorrt_rtx").__version__)
    assert machine["nvrtc"].status == "ok"
    assert machine["plugin"].text.startswith("all 8 specializations of its kernels compile")
    assert by_topic(report.engines)["auto"].text == "takes onnxruntime"
    assert report.gpu == gpu.describe_gpu()
    assert (report.can_generate, report.engine, report.bundle, report.bundle_path) == (True, "onnxruntime", (), None)


def test_every_engine_and_every_target_is_told_of() -> None:
    report = examine()
    assert set(statuses(report.engines)) == set(ENGINES)
    assert set(statuses(report.targets)) == set(Target)
    assert {topic for topic, status in statuses(report.targets).items() if status != "problem"} == set(
        default_targets()
    )


@no_gpu
@needs_rtx
def test_a_bundle_on_this_machine(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle)
    report = examine(bundle)
    assert statuses(report.bundle) == {"pipeline": "ok", "plans tensorrt": "warning", "plans tensorrt_rtx": "warning"}
    tensorrt, rtx = report.bundle[1:]
    assert tensorrt.text == "no plans for TensorRT"
    assert tensorrt.remedy == f"on the machine with the GPU: {bundle.export_command('tensorrt')}"
    assert rtx.text.endswith("the installed version, but there is no GPU to run them")
    assert (report.can_generate, report.engine) == (True, "onnxruntime")
    assert by_topic(report.engines)["torch"].text == "on the CPU, from the checkpoint sd3-mini"


# What of a bundle does not run


@no_gpu
def test_a_bundle_in_bfloat16_runs_in_torch(mini_bundle: Path) -> None:
    report = examine(changed(mini_bundle, dtype=DType.BF16))
    engines = by_topic(report.engines)
    assert engines["onnxruntime"].status == "problem"
    assert engines["onnxruntime"].remedy == "export with --dtype fp32, or use --engine torch"
    assert engines["auto"] == Finding(
        "auto", "problem", "takes onnxruntime, which does not run here", "take --engine torch"
    )
    assert (report.can_generate, report.engine) == (True, "torch")


def test_a_checkpoint_that_is_gone(mini_bundle: Path) -> None:
    report = examine(changed(mini_bundle, source=Source(kind="directory", location="/gone")))
    engines = by_topic(report.engines)
    assert engines["torch"] == Finding(
        "torch", "problem", "the checkpoint /gone is not there any more", "export it again"
    )
    assert report.can_generate


def test_a_bundle_without_a_pipeline(mini_bundle: Path) -> None:
    report = examine(changed(mini_bundle, pipeline=None))
    assert report.bundle[0].status == "problem"
    assert "was exported with random weights" in report.bundle[0].text
    assert not report.can_generate


def test_a_pipeline_on_the_hub_is_not_asked_for(mini_bundle: Path) -> None:
    report = examine(changed(mini_bundle, pipeline=PipelineSpec(kind="hub", hub_id="some/sd3")))
    assert report.bundle[0].status == "warning"
    assert report.bundle[0].text.startswith("some/sd3 on the hub")
    assert report.can_generate


@pytest.mark.parametrize(
    ("file", "section", "topic", "can_generate"),
    [
        ("step.onnx.data", "engines", "onnxruntime", True),  # by torch
        ("pipeline/model_index.json", "bundle", "pipeline", False),
        ("plans/", "bundle", "plans tensorrt_rtx", True),
    ],
)
@needs_rtx
def test_a_damaged_bundle(
    mini_bundle: Path, tmp_path: Path, file: str, section: str, topic: str, can_generate: bool
) -> None:
    copied = tmp_path / "bundle"
    shutil.copytree(mini_bundle, copied)
    path = next(copied.rglob("step.plan")) if file == "plans/" else copied / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    bundle = Bundle.open(copied)
    report = examine(bundle)
    finding = by_topic(getattr(report, section))[topic]
    assert finding.status == "problem"
    assert "was changed after the export" in finding.text
    assert finding.remedy == f"run cat-export again: {bundle.export_command()}"
    assert report.can_generate == can_generate
