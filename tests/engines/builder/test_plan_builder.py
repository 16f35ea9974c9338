"""The building process from the inside.

TensorRT's builder is not on PyPI; its double is the real TensorRT-RTX: see `builder_double.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from builder_double import Tensorrt
from recorded_names import record

from cat_pruning.bundle.profiles import plan_profiles, profile_spec
from cat_pruning.bundle.schema import Geometry
from cat_pruning.engines.builder import plan_builder
from cat_pruning.engines.builder.build import can_build, token_nodes
from cat_pruning.engines.builder.plan_builder import PlanJob, PlanReport, build
from cat_pruning.engines.plan_caches import read_cache, write_cache
from cat_pruning.engines.tensorrt_library import library_log, tensorrt_library
from cat_pruning.errors import EngineError
from cat_pruning.exporter.export import graph_spec
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part

needs_rtx = pytest.mark.skipif(
    not can_build("tensorrt_rtx"), reason="TensorRT-RTX is not installed; install '.[tensorrt-rtx]'"
)
# "Timing cache operations are no-ops in TensorRT-RTX"; the double uses them all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX")


# ------------------------------------------------------------------ the path of TensorRT


@pytest.fixture
def scatter_job(export_tiny: Any, tmp_path: Path) -> PlanJob:
    """A tiny SD3 step whose plugins serve its scatters."""
    tiny = export_tiny("sd3")
    geometry = Geometry(pixels_per_latent=8, patch_size=2, latent_channels=4, max_latent_size=None, text_length=7)
    profile = profile_spec(80, 64, 1, geometry=geometry, settings=PruneSettings(num_clusters=4), guidance=True)
    graph = graph_spec(Part.STEP, tiny.graphs[Part.STEP])
    nodes = token_nodes(tiny.directory / graph.file)
    assert nodes["TokenGather"] >= 1
    return PlanJob(
        flavour="tensorrt",
        onnx=str(tiny.directory / graph.file),
        plan=str(tmp_path / "step.plan"),
        profiles=plan_profiles(graph, [profile], 2),
        plugin_nodes={"TokenScatter": nodes["TokenScatter"]},
        timing_cache=str(tmp_path / "sd3.cache" / "timings"),
    )


@pytest.fixture
def small_job(attention_job: Callable[..., PlanJob], tmp_path: Path) -> PlanJob:
    """For what does not depend on the graph."""
    return attention_job("float", timing_cache=str(tmp_path / "sd3.cache" / "timings"))


def changed(job: PlanJob, **changes: Any) -> PlanJob:
    return PlanJob(**{name: getattr(job, name) for name in PlanJob.__dataclass_fields__} | changes)


@pytest.mark.long
@needs_rtx
def test_a_plan_with_plugins(tensorrt: Tensorrt, scatter_job: PlanJob) -> None:
    heads, rows = 4, 20 + 7  # of 80x64 pixels and the text
    assert build(scatter_job) == PlanReport(
        attention="decomposable",  # heads of 8 in fp32
        score_bytes=2 * heads * rows**2 * 2,
        engine_layers=3,
        engine_plugins=1,
        fused_attention=0,
        scratch_bytes=4096,
    )
    size = Path(scatter_job.plan).stat().st_size
    compiled = [words for words in tensorrt.asked if words.startswith("compile")]
    assert len(compiled) == scatter_job.plugin_nodes["TokenScatter"]
    assert set(compiled) == {"compile for FLOAT (-1, -1, 32)", "compile for FLOAT (-1, -1, 16)"}
    assert [words for words in tensorrt.asked if words not in compiled] == [
        "register in tensorrt",
        "network 1010",
        "config",
        "build, aliased True, DETAILED",
        "tf32 False",
        "decomposable [True]",
        f"load {size} bytes",
    ]
    assert tensorrt.asked.index("config") > tensorrt.asked.index(compiled[-1])  # before the long build


@needs_rtx
@pytest.mark.parametrize("tensorrt", [False], indirect=True)
def test_a_plan_without_plugins_registers_none(tensorrt: Tensorrt, small_job: PlanJob) -> None:
    build(small_job)
    assert tensorrt.asked[:3] == ["network 10", "config", "build, aliased False, DETAILED"]


@needs_rtx
def test_a_refittable_plan(tensorrt: Tensorrt, small_job: PlanJob) -> None:
    build(changed(small_job, refittable=True))
    assert "refit" in tensorrt.asked
    tensorrt.asked.clear()
    build(small_job)
    assert "refit" not in tensorrt.asked


@needs_rtx
def test_the_parser_names_weights_as_the_graph_does(scatter_job: PlanJob) -> None:
    """By these names they are given to a refit."""
    trt = tensorrt_library("tensorrt_rtx")
    log = library_log(trt)
    network = trt.Builder(log.handle).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.handle)
    assert parser.parse_from_file(scatter_job.onnx)
    graph = onnx.load(scatter_job.onnx, load_external_data=False).graph
    weights = [tensor.name for tensor in graph.initializer if tensor.name.endswith((".weight", ".weight.T"))]
    assert len(weights) > 10
    assert [name for name in weights if not network.mark_weights_refittable(name)] == []
    assert not network.mark_weights_refittable("transformer.nothing.weight")


@needs_rtx
@pytest.mark.parametrize("tensorrt", [False], indirect=True)
def test_a_parser_that_takes_the_function_bodies(tensorrt: Tensorrt, scatter_job: PlanJob) -> None:
    """The real parser, for which nothing is registered, does."""
    count = scatter_job.plugin_nodes["TokenScatter"]
    with pytest.raises(EngineError) as caught:
        build(scatter_job)
    assert str(caught.value) == (
        "the plugin was asked for, and TensorRT 11.4.0 took the function bodies of the token operators instead: "
        f"0 plugin layers, expected {count} ({count} TokenScatter); build with --no-plugin, which needs none"
    )
    assert not Path(scatter_job.plan).exists()
    assert tensorrt.asked[-1] == "network 1010"


@needs_rtx
def test_a_plugin_that_cannot_be_made(
    tensorrt: Tensorrt, scatter_job: PlanJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cat_pruning.plugins.tensorrt_plugin", None)
    with pytest.raises(EngineError, match=r"^the token plugin cannot be made here .*pip install .*, or --no-plugin$"):
        build(scatter_job)


@needs_rtx
@pytest.mark.parametrize("problem", ["not loaded", "no inspector", "no JSON"])
def test_a_built_plan_is_not_lost_to_what_cannot_be_asked(tensorrt: Tensorrt, small_job: PlanJob, problem: str) -> None:
    tensorrt.loads = problem != "not loaded"
    tensorrt.information = "{ no JSON" if problem == "no JSON" else json.dumps({"Layers": []})
    if problem == "no inspector":
        vars(tensorrt)["Runtime"] = lambda log: SimpleNamespace(
            deserialize_cuda_engine=lambda plan: SimpleNamespace(device_memory_size_v2=1)
        )
    report = build(small_job)
    assert Path(small_job.plan).stat().st_size > 0
    assert report.engine_layers is report.engine_plugins is report.fused_attention is None
    assert report.attention == "decomposable"
    if problem == "no JSON":
        assert report.scratch_bytes == 4096
    else:
        (warning,) = report.warnings
        assert warning.startswith("the plan was built, and its engine could not be inspected: ")


@needs_rtx
def test_what_a_callback_said_is_part_of_the_error(tensorrt: Tensorrt, scatter_job: PlanJob) -> None:
    tensorrt.refusals = 1
    tensorrt.callback_errors.append("EngineError: a token plugin got FP8")
    with pytest.raises(EngineError) as caught:
        build(scatter_job)
    assert str(caught.value) == (
        "Could not find any implementation for node {ForeignNode}; the token plugin said: EngineError: a token plugin "
        "got FP8; --no-plugin builds without our kernels"
    )


@needs_rtx
def test_kernels_that_cannot_be_compiled_are_told_before_the_build(
    tensorrt: Tensorrt, scatter_job: PlanJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tokens: Any, indices: Any) -> None:
        raise EngineError("NVRTC cannot be loaded")

    monkeypatch.setattr(sys.modules["cat_pruning.plugins.tensorrt_plugin"], "compile_kernels", refuse)
    with pytest.raises(EngineError, match="NVRTC cannot be loaded"):
        build(scatter_job)
    assert "config" not in tensorrt.asked


@needs_rtx
@pytest.mark.parametrize("found", ["none", "earlier", "damaged"])
def test_the_timing_cache_is_written_after_the_build(tensorrt: Tensorrt, small_job: PlanJob, found: str) -> None:
    assert small_job.timing_cache is not None
    path = Path(small_job.timing_cache)
    if found == "earlier":
        build(small_job)
    elif found == "damaged":
        path.parent.mkdir()
        path.write_bytes(b"x" * 99)
    build(small_job)
    assert read_cache(path)


def test_a_timing_cache_of_another_gpu_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attached: list[bytes] = []

    def attach(cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        attached.append(cache)
        return cache == b""

    config = SimpleNamespace(create_timing_cache=lambda data: data, set_timing_cache=attach)
    path = tmp_path / "cache"
    write_cache(path, b"of another GPU")
    assert plan_builder._timing_cache(config, path) == b""
    assert attached == [b"of another GPU", b""]
    assert caplog.messages == [f"{path} is not of this TensorRT on this GPU and is ignored"]


def test_a_builder_that_is_null(tensorrt: Tensorrt, scatter_job: PlanJob) -> None:
    """What the bindings raise where the driver is too old."""

    def null(log: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    tensorrt.Builder = null
    with pytest.raises(EngineError, match="nullptr"):
        build(scatter_job)


# ------------------------------------------------------------------ the API

ONLY_TENSORRT = {"NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS"}
ONLY_TENSORRT_RTX = {"BuilderFlag.REQUIRE_USER_ALLOCATION"}

MISSING = """
import importlib, json
trt = importlib.import_module({module!r})
def has(name):
    place = trt
    for part in name.split("."):
        if not hasattr(place, part):
            return False
        place = getattr(place, part)
    return True
print(json.dumps([name for name in {names!r} if not has(name)]))
"""


@pytest.mark.long
@needs_rtx
def test_every_name_that_the_builder_uses_is_in_both_libraries(
    tensorrt: Tensorrt,
    scatter_job: PlanJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    python_with_bindings: Callable[[str], str],
) -> None:
    """Those of TensorRT's builds, of TensorRT-RTX's and of one that is refused, while they run."""
    rtx, used = tensorrt_library("tensorrt_rtx"), tensorrt.used
    (tmp_path / "no.onnx").write_bytes(b"not a model")
    with pytest.MonkeyPatch.context() as patch:
        record(tensorrt, used, patch)
        build(changed(scatter_job, refittable=True))
        with pytest.raises(EngineError):
            build(changed(scatter_job, onnx=str(tmp_path / "no.onnx")))
    with pytest.MonkeyPatch.context() as patch:
        record(rtx, used, patch)
        patch.setattr(plan_builder, "tensorrt_library", lambda flavour: rtx)
        build(changed(scatter_job, flavour="tensorrt_rtx", plugin_nodes={}, timing_cache=None))
    assert used > {
        "Builder.create_network", "OnnxParser.parse_from_file", "OnnxParser.get_error", "LayerType.PLUGIN_V3",
        "IAttention.decomposable", "IBuilderConfig.create_timing_cache", "BuilderFlag.REFIT",
        "IOptimizationProfile.set_shape", "EngineInspector.get_engine_information", *ONLY_TENSORRT, *ONLY_TENSORRT_RTX,
    }  # fmt: skip
    assert {name for name in used if not hasattr(getattr(rtx, name.split(".")[0]), name.split(".")[1])} == ONLY_TENSORRT
    program = MISSING.format(module="tensorrt_bindings", names=[*sorted(used), "Builder.frobnicate"])
    assert set(json.loads(python_with_bindings(program))) == {*ONLY_TENSORRT_RTX, "Builder.frobnicate"}


@needs_rtx
@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_only_tensorrt_rtx_is_asked_for_steps_that_can_be_captured(flavour: Any) -> None:
    rtx = tensorrt_library("tensorrt_rtx")
    job = PlanJob(flavour=flavour, onnx="", plan="", profiles=[], plugin_nodes={}, timing_cache=None)
    builder = rtx.Builder(library_log(rtx).handle)
    config = plan_builder._config(rtx, builder, job)
    assert config.get_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION) is (flavour == "tensorrt_rtx")
    assert not config.get_flag(rtx.BuilderFlag.TF32)


# ------------------------------------------------------------------ what a plugin serves


def test_the_token_operators_of_a_graph_are_counted(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("TokenScatter", ["x"], ["y"], domain="cat"),
        onnx.helper.make_node("TokenScatter", ["y"], ["z"], domain="cat"),
        onnx.helper.make_node("TokenGather", ["z"], ["w"], domain="cat"),
        onnx.helper.make_node("TokenGather", ["w"], ["v"], domain="another"),
        onnx.helper.make_node("Relu", ["v"], ["u"]),
    ]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [])), tmp_path / "step.onnx")
    assert token_nodes(tmp_path / "step.onnx") == {"TokenScatter": 2, "TokenGather": 1}


@pytest.mark.parametrize("part", [Part.PROMPT, Part.TIMESTEP])
def test_only_the_step_has_token_operators(export_tiny: Any, part: Part) -> None:
    assert token_nodes(export_tiny("sd3").directory / part.onnx) == {}
