"""Plans and layers against ONNX Runtime and torch, through the real Polygraphy: what is wrong is named."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import external_data_helper
from tensorrt_double import TensorRTDouble, write_plan

from cat_pruning.bundle.bundle import BundleWriter
from cat_pruning.bundle.profiles import PlanProfile, profile_spec
from cat_pruning.bundle.schema import Geometry, GraphSpec, PlanSpec, TokenOps
from cat_pruning.components import Component
from cat_pruning.dtype import DType
from cat_pruning.engines.builder.build import build_plan, can_build
from cat_pruning.errors import EngineError, InstallationError
from cat_pruning.exporter import plans as plans_module
from cat_pruning.exporter import verification, verify_plans
from cat_pruning.exporter.calibration import Calibration
from cat_pruning.exporter.export import graph_spec
from cat_pruning.exporter.layers import layer_outputs, marked_graphs
from cat_pruning.exporter.plans import build_plans
from cat_pruning.exporter.progress import logged_stage
from cat_pruning.exporter.quantize import quantize_step
from cat_pruning.exporter.verification import Samples, Verification
from cat_pruning.exporter.verify import QUANTIZED_TOLERANCE, Verify
from cat_pruning.exporter.verify_plans import StepSample, sample_layers, sample_outputs
from cat_pruning.names import Flavour, Quantization
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import LATENTS, Part, output_name

needs_polygraphy = pytest.mark.skipif(
    importlib.util.find_spec("polygraphy") is None, reason="Polygraphy is not installed; install '.[debug]'"
)
needs_rtx = pytest.mark.skipif(not can_build("tensorrt_rtx"), reason="TensorRT-RTX is not installed; install '.[rtx]'")


@pytest.fixture
def files(tmp_path: Path) -> Callable[[Any], Path]:
    """A copy of a tiny model's files, the test's own."""

    def copy(export: Any) -> Path:
        return Path(shutil.copytree(export.directory, tmp_path / "files"))

    return copy


def dims_of(export: Any, num_kept: int = 21) -> Any:
    return export.step.family.dims((7, 10), batch=1, text_length=9, num_kept=num_kept)


_GEOMETRY = Geometry(pixels_per_latent=8, patch_size=2, latent_channels=4, max_latent_size=None, text_length=7)
PROFILE = profile_spec(80, 64, 1, geometry=_GEOMETRY, settings=PruneSettings(num_clusters=4), guidance=True)


def damage(directory: Path, part: Part, weight: str) -> None:
    """Changes one weight in a part's data, a little."""
    model = onnx.load(directory / part.onnx, load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == weight]
    info = external_data_helper.ExternalDataInfo(tensor)
    values = np.memmap(directory / info.location, np.float32, "r+", info.offset, (info.length // 4,))
    values[: values.size // 2] *= 1.05
    values.flush()


# ------------------------------------------------------------------ layers


@needs_polygraphy
def test_the_layers_of_a_good_export(tiny_export: Any, files: Any) -> None:
    directory = files(tiny_export)
    before = sorted(directory.iterdir())
    sample = sample_layers(tiny_export.step, dims_of(tiny_export), directory)
    compared = {layer for named in sample.layers.values() for layer in named.values()}
    modules = tiny_export.step.transformer.named_modules()
    assert compared == {name for name, module in modules if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    assert 0 < verify_plans.verify_layers(directory, sample, DType.FP32) < 1e-4
    assert sorted(directory.iterdir()) == before


@needs_polygraphy
@pytest.mark.parametrize(
    ("part", "layer"),
    [
        (Part.PROMPT, "context_embedder"),
        (Part.TIMESTEP, "transformer_blocks.1.norm1_context.linear"),
        (Part.STEP, "pos_embed.proj"),
        (Part.STEP, "transformer_blocks.1.attn.add_k_proj"),
        (Part.STEP, "transformer_blocks.1.ff.net.2"),
    ],
)
def test_the_first_layer_that_differs(export_tiny: Any, files: Any, part: Part, layer: str) -> None:
    """The one whose weight was changed; all that it feeds differ too."""
    export = export_tiny("sd3")
    directory = files(export)
    stored = {tensor.name for tensor in onnx.load(directory / part.onnx, load_external_data=False).graph.initializer}
    (weight,) = {f"transformer.{layer}.weight", f"transformer.{layer}.weight.T"} & stored
    damage(directory, part, weight)
    sample = sample_layers(export.step, dims_of(export), directory)
    with pytest.raises(EngineError) as caught:
        verify_plans.verify_layers(directory, sample, DType.FP32)
    (tensor,) = [tensor for tensor, name in sample.layers[part].items() if name == layer]
    assert caught.value.problem.startswith(
        f"--verify: {part}.onnx with 21 of 70 tokens: the layer {layer} (tensor {tensor}) is the first of its results "
        "in ONNX Runtime to be off torch's: by "
    )
    assert not list(directory.glob(".*"))


def test_a_layer_that_runs_twice_is_none(export_tiny: Any) -> None:
    graph = onnx.load(export_tiny("sd3").directory / "step.onnx", load_external_data=False).graph
    layers = layer_outputs(graph)
    (node,) = [node for node in graph.node if "transformer.proj_out.weight.T" in node.input]
    graph.node.append(onnx.helper.make_node("MatMul", list(node.input), ["again"]))
    assert set(layers.values()) - set(layer_outputs(graph).values()) == {"proj_out"}


@needs_polygraphy
@needs_rtx
def test_tensorrt_rtx_builds_a_graph_with_its_layers_marked(export_tiny: Any, files: Any, tmp_path: Path) -> None:
    """As far as it goes without a GPU: its plan is not loaded."""
    export = export_tiny("sd3")
    directory, dims = files(export), dims_of(export)
    (spec,) = [plan for plan in plans_of("tensorrt_rtx") if plan.part is Part.STEP]
    shapes = graph_spec(Part.STEP, export.graphs[Part.STEP]).input_shapes(dims)
    sample = sample_layers(export.step, dims, directory)
    with marked_graphs(directory, sample.layers) as marked:
        profile: PlanProfile = {name: (shape,) * 3 for name, shape in shapes.items()}
        build_plan(spec, marked[Part.STEP], tmp_path / "step.plan", [profile])
    assert (tmp_path / "step.plan").stat().st_size > (directory / "step.onnx.data").stat().st_size / 2


# ------------------------------------------------------------------ plans, by a double that computes with ONNX Runtime


def plans_of(flavour: Flavour, token_ops: TokenOps = "function") -> list[PlanSpec]:
    return [
        PlanSpec(
            part=part,
            flavour=flavour,
            version="11.4.0",
            architectures=("sm89",),
            token_ops=token_ops,
            file=f"{flavour}/{part}.plan",
        )
        for part in Part
    ]


def write_plans(plans: Sequence[PlanSpec], directory: Path, graphs: Sequence[GraphSpec], sample: StepSample) -> None:
    """The double's plans of the graphs in `directory`, at the sample's shapes."""
    for plan, graph in zip(plans, graphs, strict=True):
        profile = {name: (shape,) * 3 for name, shape in graph.input_shapes(sample.dims).items()}
        (directory / plan.file).parent.mkdir(exist_ok=True)
        write_plan(directory / plan.file, directory / graph.file, [profile], aliases_of(plan, sample))


def aliases_of(plan: PlanSpec, sample: StepSample) -> dict[str, str]:
    shared = sample.in_place if plan.part is Part.STEP and plan.token_ops == "plugin" else frozenset()
    return {output_name(name): name for name in shared}


def graphs_of(export: Any) -> list[GraphSpec]:
    return [graph_spec(part, export.graphs[part]) for part in Part]


@needs_polygraphy
@pytest.mark.parametrize(("flavour", "token_ops"), [("tensorrt", "plugin"), ("tensorrt_rtx", "function")])
@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_good_plans(
    export_tiny: Any, files: Any, library: TensorRTDouble, kind: str, flavour: Flavour, token_ops: TokenOps
) -> None:
    export = export_tiny(kind)
    directory, sample = files(export), sample_outputs(export.step, dims_of(export))
    plans, graphs = plans_of(flavour, token_ops), graphs_of(export)
    write_plans(plans, directory, graphs, sample)
    assert ("noise" in sample.in_place) == (kind == "flux-dev")
    assert 0 < verify_plans.verify_plans(plans, directory, graphs, sample, DType.FP32) < 1e-4
    assert library.calls.count("execute_async_v3") == len(Part)


@needs_polygraphy
def test_plans_of_a_quantized_step(
    export_tiny: Any, files: Any, library: TensorRTDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch computed without: what the quantization errs is no mistake of the plan's, and what is more is one."""
    export = export_tiny("sd3")
    directory, sample = files(export), sample_outputs(export.step, dims_of(export))
    quantize_step(directory, Quantization.INT8)
    plans, graphs = plans_of("tensorrt"), graphs_of(export)
    write_plans(plans, directory, graphs, sample)
    quantization = Quantization.INT8_CALIBRATED
    assert 1e-3 < verify_plans.verify_plans(plans, directory, graphs, sample, DType.FP32, quantization) < 1e-1
    monkeypatch.setitem(QUANTIZED_TOLERANCE, quantization, 9e-4)
    with pytest.raises(
        EngineError, match=r" where at most 1e-03 is rounding in fp32 and the error of int8-calibrated; "
    ):
        verify_plans.verify_plans(plans, directory, graphs, sample, DType.FP32, quantization)


@needs_polygraphy
def test_a_calibrated_step_is_sampled_where_its_scales_are(
    export_tiny: Any, files: Any, library: TensorRTDouble
) -> None:
    """And not for the plans before it is quantized."""
    export, plans = export_tiny("sd3"), plans_of("tensorrt")
    directory, graphs = files(export), graphs_of(export)
    verifying = Verification(level=Verify.OUTPUTS, dtype=DType.BF16, plans=tuple(plans))
    assert verifying.sample(export.step, directory, PROFILE, logged_stage, for_plans=False) == Samples()
    dims = dims_of(export, num_kept=70)
    seen = {LATENTS: torch.full([int(dim) for dim in export.step.family.step_shapes(dims)[LATENTS]], 0.25)}
    calibration = Calibration(ranges={}, dims=dims, inputs=seen)
    samples = verifying.check_quantized(export.step, directory, Quantization.FP8, logged_stage, calibration)
    assert samples.quantization is Quantization.FP8
    assert samples.outputs is not None
    assert samples.outputs.inputs[LATENTS] is seen[LATENTS]
    quantize_step(directory, Quantization.INT8)
    write_plans(plans, directory, graphs, samples.outputs)
    verifying.check_plans(plans, samples, directory, graphs, logged_stage)


@needs_polygraphy
@pytest.mark.parametrize(
    ("part", "weight", "first", "reference"),
    [
        (Part.PROMPT, "context_embedder.weight.T", "prompt_states_0", "ONNX Runtime"),
        (Part.STEP, "transformer_blocks.1.attn.to_v.weight.T", "value_cache_1_out", "torch"),
        (Part.STEP, "proj_out.weight.T", "noise_out", "torch"),
    ],
)
def test_a_plan_that_computes_something_else(
    export_tiny: Any, files: Any, library: TensorRTDouble, part: Part, weight: str, first: str, reference: str
) -> None:
    """Of the prompt's and the timestep's results torch knows nothing: the layers tell."""
    export = export_tiny("sd3")
    directory, sample = files(export), sample_outputs(export.step, dims_of(export))
    plans, graphs = plans_of("tensorrt"), graphs_of(export)
    write_plans(plans, directory, graphs, sample)
    damage(directory, part, f"transformer.{weight}")
    good = {each: export.directory / each.onnx for each in Part}
    make = verify_plans._plan_runners(plans, {plan.part: directory / plan.file for plan in plans}, graphs, sample)
    with pytest.raises(EngineError) as caught:
        verify_plans.compare_graphs(good, sample, DType.FP32, make)
    assert caught.value.problem.startswith(
        f"--verify: {part}.onnx with 21 of 70 tokens: {first} is the first of its results in TensorRT's plan to be off "
        f"{reference}'s: by "
    )
    assert caught.value.problem.endswith("of the largest value, where at most 1e-04 is rounding in fp32")
    assert caught.value.remedy == "--verify layers tells the first layer that differs"


@pytest.mark.long
@needs_polygraphy
def test_the_layers_of_plans(
    export_tiny: Any, files: Any, library: TensorRTDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans are built for it of the marked graphs; here one of the damaged graph, that only the plan runs."""
    export = export_tiny("sd3")
    directory, sample = files(export), sample_layers(export.step, dims_of(export), export.directory)
    plans, graphs, damaged = plans_of("tensorrt", "plugin"), graphs_of(export), directory / "damaged"
    built = []

    def build(plan: PlanSpec, graph: Path, file: Path, profiles: list[PlanProfile]) -> None:
        copy = shutil.copytree(export.directory, damaged / plan.part) / graph.name
        shutil.copyfile(graph, copy)
        if plan.part is Part.STEP and built.count(Part.STEP):
            damage(copy.parent, Part.STEP, "transformer.transformer_blocks.0.attn.to_out.0.weight.T")
        write_plan(file, copy, profiles, aliases_of(plan, sample))
        built.append(plan.part)

    monkeypatch.setattr(verify_plans, "build_plan", build)
    assert verify_plans.verify_layers(directory, sample, DType.FP32, plans, graphs) < 1e-4
    assert built == list(Part)
    shutil.rmtree(damaged)
    with pytest.raises(
        EngineError, match=r"the layer transformer_blocks\.0\.attn\.to_out\.0 \(tensor linear_\d+\) .*plan"
    ):
        verify_plans.verify_layers(directory, sample, DType.FP32, plans, graphs)


@needs_polygraphy
def test_in_bf16_a_plan_is_held_against_torch_alone(export_tiny: Any, files: Any, library: TensorRTDouble) -> None:
    """With graphs that ONNX Runtime cannot load, which it therefore did not. The double computes in fp32."""
    export = export_tiny("sd3")
    directory, sample = files(export), sample_outputs(export.step, dims_of(export))
    plans, graphs = plans_of("tensorrt"), graphs_of(export)
    write_plans(plans, directory, graphs, sample)
    others = directory / "others"
    others.mkdir()
    for part in Part:
        shutil.copyfile(directory / part.onnx, others / part.onnx)
    make = verify_plans._plan_runners(plans, {plan.part: directory / plan.file for plan in plans}, graphs, sample)
    graphs_without_weights = {part: others / part.onnx for part in Part}
    assert 0 < verify_plans.compare_graphs(graphs_without_weights, sample, DType.BF16, make) < 1e-4
    with pytest.raises(EngineError, match=r"^--verify: prompt\.onnx does not run: "):
        verify_plans.compare_graphs(graphs_without_weights, sample, DType.FP32, make)


@needs_polygraphy
def test_shapes_that_the_plan_was_not_built_for(export_tiny: Any, files: Any, library: TensorRTDouble) -> None:
    export = export_tiny("sd3")
    directory, sample = files(export), sample_outputs(export.step, dims_of(export))
    plans, graphs = plans_of("tensorrt"), graphs_of(export)
    write_plans(plans, directory, graphs, dataclasses.replace(sample, dims=dims_of(export, num_kept=30)))
    with pytest.raises(
        Exception, match=r"keep_indices has shape \(1, 21\), the plan step.plan was built for \(1, 30\)"
    ):
        verify_plans.verify_plans(plans, directory, graphs, sample, DType.FP32)


@needs_polygraphy
@pytest.mark.parametrize(("call", "message"), [("", "cannot load it: "), ("execute_async_v3", "failed in a step")])
def test_a_plan_that_does_not_run(
    export_tiny: Any, files: Any, library: TensorRTDouble, call: str, message: str
) -> None:
    export = export_tiny("sd3")
    directory, sample = files(export), sample_outputs(export.step, dims_of(export))
    plans, graphs = plans_of("tensorrt"), graphs_of(export)
    write_plans(plans, directory, graphs, sample)
    library.fail.add(call)
    if not call:
        (directory / plans[-1].file).write_bytes(b"no plan")
    with pytest.raises(EngineError, match=rf"\.plan: TensorRT 11\.4\.0 {message}"):
        verify_plans.verify_plans(plans, directory, graphs, sample, DType.FP32)


# ------------------------------------------------------------------ what is compared where


def test_what_runs_here_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "require", lambda purpose, extra: None)
    plans = plans_of("tensorrt")
    for architecture, expected in (("sm89", tuple(plans)), ("sm90", ()), (None, ())):
        monkeypatch.setattr(verify_plans, "gpu_architecture", lambda found=architecture: found)
        assert Verification.of(Verify.OUTPUTS, DType.FP32, plans).plans == expected
    assert Verification.of(None, DType.BF16, plans).plans == ()
    with pytest.raises(EngineError, match=r"--verify: .* bf16, and no plan is built that runs here; .*--dtype fp32"):
        Verification.of(Verify.OUTPUTS, DType.BF16, plans)
    monkeypatch.setattr(verify_plans, "gpu_architecture", lambda: "sm89")
    assert Verification.of(Verify.OUTPUTS, DType.BF16, plans).plans == tuple(plans)


def test_polygraphy_is_asked_for_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cat_pruning.installation.find_spec", lambda name: None if name == "polygraphy" else name)
    plans = plans_of("tensorrt")
    assert Verification.of(None, DType.FP32, plans).plans == ()
    assert Verification.of(Verify.OUTPUTS, DType.FP32, plans).plans == ()  # torch and ONNX Runtime alone
    message = r"that run here, needs polygraphy, not installed here; pip install 'cat-pruning\[debug\]'"
    with pytest.raises(InstallationError, match=message):
        Verification.of(Verify.LAYERS, DType.FP32, [])
    monkeypatch.setattr(verify_plans, "gpu_architecture", lambda: "sm89")
    with pytest.raises(InstallationError, match=message):
        Verification.of(Verify.OUTPUTS, DType.FP32, plans)


@pytest.mark.long
@needs_polygraphy
def test_every_comparison_of_an_export(
    export_tiny: Any, files: Any, library: TensorRTDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module is sampled at the profile's pruned step; the stages tell what is compared."""
    export = export_tiny("sd3")
    directory, graphs, plans = files(export), graphs_of(export), plans_of("tensorrt")
    monkeypatch.setattr(verify_plans, "gpu_architecture", lambda: "sm89")
    monkeypatch.setattr(
        verify_plans, "build_plan", lambda plan, graph, file, profiles: write_plan(file, graph, profiles, {})
    )
    titles: list[str] = []

    def stage(title: str) -> Any:
        titles.append(title)
        return logged_stage(title)

    verifying = Verification.of(Verify.LAYERS, DType.FP32, plans)
    samples = verifying.sample(export.step, directory, PROFILE, stage)
    assert samples.outputs is not None
    assert (samples.outputs.dims.batch, samples.outputs.dims.num_kept, samples.outputs.dims.num_tokens) == (2, 6, 20)
    write_plans(plans, directory, graphs, samples.outputs)
    verifying.check_plans(plans, samples, directory, graphs, stage)
    verifying.check_plans(plans_of("tensorrt_rtx"), samples, directory, graphs, stage)  # of which none runs here
    assert titles == [
        "Compare every layer under ONNX Runtime with torch",
        "Compare ONNX Runtime with torch",
        "Compute a step of 80x64-p1 with torch",
        "Compare every layer under TensorRT with torch",
        "Compare the TensorRT plans with ONNX Runtime and torch",
    ]


def test_plans_that_compute_something_else_are_not_kept(
    export_tiny: Any, files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As plans that cannot be built: the bundle is written without them, unless it would replace one."""
    directory = files(export_tiny("sd3"))
    monkeypatch.setattr(
        plans_module, "build_plan", lambda plan, graph, file, *_: (file.parent.mkdir(exist_ok=True), file.touch())
    )
    monkeypatch.setattr(plans_module, "with_report", lambda plan, report: plan)
    asked: list[list[str]] = []

    def verify(plans: Sequence[PlanSpec]) -> None:
        asked.append([plan.file for plan in plans])
        if plans[0].flavour == "tensorrt":
            raise EngineError("--verify: step.onnx is wrong")

    plans = [*plans_of("tensorrt"), *plans_of("tensorrt_rtx")]
    writer = BundleWriter(path=directory, out=tmp_path / "bundle", force=False)
    shapes: dict[Part | Component, list[PlanProfile]] = {part: [] for part in Part}
    built, failure = build_plans(plans, shapes, writer, logged_stage, verify)
    assert asked == [[f"{flavour}/{part}.plan" for part in Part] for flavour in ("tensorrt", "tensorrt_rtx")]
    assert built == tuple(plans[3:])
    assert str(failure) == "--verify: step.onnx is wrong"
    assert not (directory / "tensorrt").exists()
    assert len(list((directory / "tensorrt_rtx").iterdir())) == len(Part)
    writer.out.mkdir()
    with pytest.raises(EngineError, match=r"step\.onnx is wrong"):
        build_plans(plans, shapes, writer, logged_stage, verify)
