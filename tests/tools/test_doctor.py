"""What `cat-doctor` finds on this machine, and where libraries are broken."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import onnxruntime
import pytest
import torch
from doctor_findings import by_topic, changed, needs_rtx, no_gpu, statuses
from safetensors.torch import load_file, save_file

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.schema import FileSpec, PipelineSpec, Source
from cat_pruning.dtype import DType
from cat_pruning.engines import gpu
from cat_pruning.engines.tensorrt_library import tensorrt_library
from cat_pruning.errors import BundleError
from cat_pruning.exporter.export import default_targets
from cat_pruning.files import sha256
from cat_pruning.models import miniatures
from cat_pruning.names import ENGINES, Target
from cat_pruning.runtime.engine_choice import engine_from_bundle
from cat_pruning.tools.bundle_checks import check_pipeline
from cat_pruning.tools.doctor import examine
from cat_pruning.tools.engine_checks import check_onnxruntime_engine
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
    own, plans = {"pipeline": "ok", "schedules": "ok"}, {"plans tensorrt": "warning", "plans tensorrt_rtx": "warning"}
    assert statuses(report.bundle) == own | plans
    tensorrt, rtx = report.bundle[2:]
    assert tensorrt.text == "no plans for TensorRT"
    assert tensorrt.remedy == f"on the machine with the GPU: cat-export --add-plans {mini_bundle} --target tensorrt"
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


def test_a_damaged_component(component_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(component_bundle, tmp_path / "copy", copy_function=os.link))
    weights = copy / "vae_decoder.onnx.data"
    content = bytearray(weights.read_bytes())
    content[0] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"vae_decoder\.onnx\.data was changed after the export"):
        check_onnxruntime_engine(Bundle.open(copy))


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
    assert "some/sd3 on the hub, not looked at: it is not whole in the local cache (some/sd3" in report.bundle[0].text
    assert report.can_generate


def test_a_pipeline_of_the_hub_is_looked_at_in_the_local_cache(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = changed(mini_bundle, pipeline=PipelineSpec(kind="hub", hub_id="some/sd3"))
    cached, asked = [str(miniatures()["sd3-mini"])], []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **told: asked.append(told["local_files_only"]) or cached[0]
    )
    assert check_pipeline(bundle) == Finding("pipeline", "ok", "some/sd3 of the hub, from the local cache")
    cached[0] = str(tmp_path)  # as an export leaves it, which needs the index and little more
    (tmp_path / "model_index.json").write_bytes((miniatures()["sd3-mini"] / "model_index.json").read_bytes())
    finding = check_pipeline(bundle)
    assert finding.status == "warning"
    assert "is incomplete: scheduler_config.json is missing" in finding.text
    assert set(asked) == {True}


@pytest.mark.parametrize(
    ("file", "section", "topic", "can_generate"),
    [
        ("step.onnx.data", "engines", "onnxruntime", True),  # by torch
        ("pipeline/model_index.json", "bundle", "pipeline", False),
        ("data_loader.py", "bundle", "schedules", True),
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


DAMAGED = [
    ({"family": "dit"}, r"model family 'dit' is not known"),
    ({"transformer_config": {}}, r"num_layers is missing"),
    ({"transformer_class": "FluxTransformer2DModel"}, r"its family sd3 is not that of a FluxTransformer2DModel"),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGED)
def test_a_model_that_no_engine_loads(mini_bundle: Path, changes: dict[str, Any], message: str) -> None:
    """The same checks as loading."""
    bundle = changed(mini_bundle, **changes)
    report = examine(bundle)
    engines = by_topic(report.engines)
    assert {engines[name].status for name in ENGINES} == {"problem"}
    assert re.search(message, engines["onnxruntime"].text)
    assert re.search(message, engines["torch"].text)
    assert (report.can_generate, report.engine) == (False, None)
    with pytest.raises(BundleError, match=message):
        engine_from_bundle(bundle, "onnxruntime")


@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
def test_a_checkpoint_with_a_weight_missing(mini_bundle: Path, tmp_path: Path, part: str) -> None:
    checkpoint = Path(shutil.copytree(miniatures()["sd3-mini"], tmp_path / "checkpoint"))
    (path,) = (checkpoint / part).glob("*.safetensors")
    weights = load_file(path)
    name, _ = weights.popitem()
    save_file(weights, path, metadata={"format": "pt"})
    bundle = changed(mini_bundle, source=Source(kind="directory", location=str(checkpoint)))
    if part != "transformer":  # as an export of a version that did not check them has copied them
        directory = Path(shutil.copytree(mini_bundle, tmp_path / "bundle"))
        copied = directory / "pipeline" / part / path.name
        shutil.copyfile(path, copied)
        files = dict(bundle.manifest.files)
        files[copied.relative_to(directory).as_posix()] = FileSpec(size=path.stat().st_size, sha256=sha256(path))
        bundle = dataclasses.replace(
            bundle, path=directory, manifest=bundle.manifest.model_copy(update={"files": files})
        )
    report = examine(bundle)
    findings = by_topic(report.engines if part == "transformer" else report.bundle)
    finding = findings["torch" if part == "transformer" else "pipeline"]
    assert finding.status == "problem"
    assert f"/{part} lacks {name}" in finding.text
    assert report.can_generate == (part == "transformer")  # by onnxruntime
