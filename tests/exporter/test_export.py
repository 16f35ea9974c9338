from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.profiles import step_dims
from cat_pruning.engines.graph_family import family_of_bundle
from cat_pruning.exporter.export import ExportConfig, export
from cat_pruning.exporter.macs import Macs, count_macs
from cat_pruning.exporter.verify import Verify
from cat_pruning.names import Target
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part, is_residual


def test_bundle_is_complete(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle)
    for name in bundle.manifest.files:
        bundle.verified(name)
    assert bundle.manifest.geometry.text_length == 48
    graphs = {name for part in Part for name in (part.onnx, f"{part.onnx}.data")}
    assert {name for name in bundle.manifest.files if "/" not in name} == {*graphs, "data_loader.py"}


@pytest.mark.long
@pytest.mark.parametrize(("kind", "rows"), [("pixart", 2), ("flux-dev", 1)])
def test_a_bundle_of_the_other_families(write_checkpoint: Any, tmp_path: Path, kind: str, rows: int) -> None:
    directory = write_checkpoint(tmp_path / "pipeline", kind)
    settings = PruneSettings(num_clusters=4)
    config = ExportConfig(
        model=str(directory), out=tmp_path / "out", resolutions=((40, 48),), settings=settings,
        targets=(Target.ONNX,), verify=Verify.OUTPUTS, text_length=7, controlnet=kind == "flux-dev",
    )  # fmt: skip
    manifest = export(config).manifest
    assert Bundle.open(tmp_path / "out").manifest == manifest
    residuals = [tensor.shape for tensor in manifest.graph(Part.STEP).inputs if is_residual(tensor.name)]
    assert residuals == ([("batch", "num_tokens", 32)] * 3 if config.controlnet else [])  # a double block, two single
    (profile,), (macs,) = manifest.profiles, manifest.macs
    assert manifest.family == kind.partition("-")[0]
    assert (profile.num_tokens, profile.num_kept, profile.batch) == (30, 9, rows)  # FLUX's guidance is an input
    assert manifest.guidance == (rows == 2)
    assert family_of_bundle(Bundle.open(tmp_path / "out")).config == manifest.transformer_config

    full, pruned = step_dims(profile, manifest.geometry.patch_size)
    counted = {
        (part, dims.num_kept): count_macs(tmp_path / "out" / part.onnx, manifest.graph(part).input_shapes(dims))
        for part in Part
        for dims in (full, pruned)
    }
    assert Macs(macs.full_linear, macs.full_attention) == counted[Part.STEP, 30]
    assert Macs(macs.pruned_linear, macs.pruned_attention) == counted[Part.STEP, 9]
    assert macs.prompt_linear == counted[Part.PROMPT, 30].linear == counted[Part.PROMPT, 9].linear > 0
    assert macs.timestep_linear == counted[Part.TIMESTEP, 9].linear > 0
    for graph in manifest.graphs:
        session = onnxruntime.InferenceSession(tmp_path / "out" / graph.file, providers=["CPUExecutionProvider"])
        for values, specs in ((session.get_inputs(), graph.inputs), (session.get_outputs(), graph.outputs)):
            assert [(value.name, tuple(value.shape)) for value in values] == [(spec.name, spec.shape) for spec in specs]
    script = runpy.run_path(str(tmp_path / "out" / "data_loader.py"))  # which reads the manifest
    for part, load in ((Part.PROMPT, "load_prompt"), (Part.TIMESTEP, "load_timestep"), (Part.STEP, "load_data")):
        (inputs,) = script[load]()
        graph = manifest.graph(part)
        assert {name: value.shape for name, value in inputs.items()} == graph.input_shapes(pruned)
