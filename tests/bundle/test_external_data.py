"""The files that a graph takes its weights from are verified, whatever they are called."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.external_data import external_files
from cat_pruning.bundle.schema import FileSpec
from cat_pruning.errors import BundleError
from cat_pruning.files import sha256


def external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_every_tensor_of_a_graph_is_looked_at(tmp_path: Path) -> None:
    inner = helper.make_graph([], "inner", [], [], initializer=[external("a", "of-a-branch")])
    nodes = [
        helper.make_node("If", ["condition"], [], then_branch=inner, else_branch=inner),
        helper.make_node("Constant", [], ["b"], value=external("b", "of-a-constant")),
    ]
    weights = [external("c", "weights"), external("d", "weights"), external("e", "../elsewhere")]
    function = helper.make_function(
        "own", "f", [], ["g"], [helper.make_node("Constant", [], ["g"], value=external("g", "of-a-function"))], []
    )
    model = helper.make_model(helper.make_graph(nodes, "graph", [], [], initializer=weights), functions=[function])
    path = tmp_path / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    assert sorted(external_files(path)) == ["../elsewhere", "of-a-branch", "of-a-constant", "of-a-function", "weights"]


def moved(mini_bundle: Path, tmp_path: Path, location: str) -> Bundle:
    """sd3-mini with the step's weights in another file, which its manifest lists."""
    directory = Path(shutil.copytree(mini_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("*.plan")))
    model = onnx.load(directory / "step.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (directory / "step.onnx").write_bytes(model.SerializeToString())
    (directory / "step.onnx.data").rename(directory / location)
    manifest = Bundle.open(mini_bundle).manifest
    files = {name: spec for name, spec in manifest.files.items() if not name.endswith(".plan")}
    files[location] = files.pop("step.onnx.data")
    graph = directory / "step.onnx"
    files["step.onnx"] = FileSpec(size=graph.stat().st_size, sha256=sha256(graph))
    return Bundle(path=directory, manifest=manifest.model_copy(update={"files": files, "plans": ()}))


def test_weights_under_another_name_are_verified(mini_bundle: Path, tmp_path: Path) -> None:
    bundle = moved(mini_bundle, tmp_path, "weights.bin")
    bundle.verify_graphs()
    content = bytearray((bundle.path / "weights.bin").read_bytes())
    content[100] ^= 1
    (bundle.path / "weights.bin").write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.bin was changed after the export"):
        bundle.verify_graphs()


def test_weights_outside_the_bundle_are_refused(mini_bundle: Path, tmp_path: Path) -> None:
    bundle = moved(mini_bundle, tmp_path, "../weights.bin")
    listed = {name: spec for name, spec in bundle.manifest.files.items() if ".." not in name}
    bundle = Bundle(path=bundle.path, manifest=bundle.manifest.model_copy(update={"files": listed}))
    with pytest.raises(BundleError, match=r"lists no file '\.\./weights\.bin'"):
        bundle.verify_graphs()


def test_what_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "step.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"step\.onnx cannot be read"):
        external_files(tmp_path / "step.onnx")
