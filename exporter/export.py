"""From `--model` to a bundle: the steps of an export, in order."""

from __future__ import annotations

import dataclasses
import gc
import logging
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cat_pruning.bundle.bundle import Bundle, new_bundle
from cat_pruning.bundle.manifest import Manifest
from cat_pruning.bundle.profiles import PlanProfile, component_profiles, plan_profiles, profile_spec, step_dims
from cat_pruning.bundle.schema import (
    Geometry,
    GraphSpec,
    LoraSpec,
    MacsSpec,
    PlanSpec,
    ProfileSpec,
    TensorSpec,
)
from cat_pruning.checkpoints.checkpoint import (
    Checkpoint,
    check_weights,
    config_of,
    find_checkpoint,
    load_transformer,
    pipeline_of,
)
from cat_pruning.checkpoints.random_weights import RandomWeights, hollow_transformer
from cat_pruning.components import COMPONENT_PARTS, Component
from cat_pruning.dtype import DType
from cat_pruning.engines.builder.build import can_build, can_build_refittable
from cat_pruning.errors import CheckpointError, EngineError, SettingsError
from cat_pruning.exporter import data_loader
from cat_pruning.exporter.calibration import calibrate
from cat_pruning.exporter.components import WantedPart, export_components, folders_of, wanted_parts
from cat_pruning.exporter.macs import Macs, count_macs
from cat_pruning.exporter.memory import check_memory, held_bytes, part_bytes
from cat_pruning.exporter.pipeline_files import add_pipeline, check_pipeline, copied_files
from cat_pruning.exporter.plans import build_plans, wanted_plans, with_component_plans
from cat_pruning.exporter.progress import Stage, logged_stage
from cat_pruning.exporter.quantize import check_patterns, check_quantization, quantize_step, quantizer_bytes
from cat_pruning.exporter.split import Graph
from cat_pruning.exporter.step_graph import export_step_graph
from cat_pruning.exporter.verification import Samples, Verification
from cat_pruning.exporter.verify import Verify
from cat_pruning.families.interception import StepModule
from cat_pruning.models.prompts import located, tuning_prompts
from cat_pruning.names import FLAVOURS, Quantization, Target
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part, StepDims
from cat_pruning.versions import versions_of

logger = logging.getLogger(__name__)

PIPELINE = "pipeline"
DATA_LOADER = "data_loader.py"
MOST_CALIBRATION_PROMPTS = 256
_SLACK_BYTES = 64 << 20  # graphs, manifest, what a file system needs itself
_VERSIONED = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "cat-pruning")


def default_targets(*, refittable: bool = False) -> tuple[Target, ...]:
    """What this machine can build, refittable or not."""
    can = can_build_refittable if refittable else can_build
    return (Target.ONNX, *(Target(flavour) for flavour in FLAVOURS if can(flavour)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """What `cat-export` was asked for.

    model, revision, random_weights, loras: see `find_checkpoint`. out: the bundle's directory; force replaces a bundle
    there. resolutions: (height, width) in pixels; empty for the model's own. prompts: numbers of prompts in a batch.
    text_length: text rows of the profiles; None for what the pipeline passes at its defaults.
    components: the pipeline's parts that become graphs, of `COMPONENT_PARTS`; their weights are in no other file then.
    guidance: classifier-free guidance doubles the rows of a batch. verify: compare graphs and plans with torch.
    plugin: our kernels for the token operators of TensorRT's plans; without, TensorRT compiles their function bodies.
    controlnet: steps take a ControlNet's residuals.
    refittable: plans take adapters at run time; ONNX Runtime does from any bundle that is not quantized.
    quantization: of the step, see `quantize_step`; one that is not calibrated in fp32 and without plans: give
        `targets=(Target.ONNX,)`.
    calibration: the prompts of a calibrated one, as `tuning_prompts` has them: `scenes:8`, or a file.
    unquantized: see `quantize_step`.
    """

    model: str
    out: Path
    revision: str | None = None
    random_weights: bool = False
    loras: tuple[LoraSpec, ...] = ()
    dtype: DType = DType.FP32
    quantization: Quantization | None = None
    calibration: str | None = None
    unquantized: tuple[str, ...] = ()
    resolutions: tuple[tuple[int, int], ...] = ()
    prompts: tuple[int, ...] = (1,)
    text_length: int | None = None
    components: tuple[str, ...] = ()
    guidance: bool = True
    settings: PruneSettings = field(default_factory=PruneSettings)
    targets: tuple[Target, ...] = field(default_factory=default_targets)
    plugin: bool = True
    controlnet: bool = False
    refittable: bool = False
    verify: Verify | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if not self.prompts or any(prompts < 1 for prompts in self.prompts):
            raise SettingsError(f"--batch {' '.join(map(str, self.prompts))}: expected numbers of prompts >= 1")
        check_quantization(self.quantization, self.calibration, self.unquantized, self.dtype, self.targets)
        if self.text_length is not None and self.text_length < 1:
            raise SettingsError(f"--text-length {self.text_length}: expected a number of text tokens >= 1")
        if unknown := [name for name in self.components if name not in COMPONENT_PARTS]:
            raise SettingsError(
                f"--components {', '.join(unknown)}: no part of a pipeline that becomes a graph",
                f"known are {', '.join(COMPONENT_PARTS)} and all",
            )
        if not self.plugin and Target.TENSORRT not in self.targets:
            raise SettingsError(
                "--no-plugin: only TensorRT's plans have the plugin, and none are built", "give --target tensorrt too"
            )
        if self.refittable and set(self.targets) <= {Target.ONNX}:
            raise SettingsError(
                "--refittable: only plans need it, and none are built; ONNX Runtime takes adapters from any bundle",
                "give --target tensorrt, or leave it out",
            )


def export(config: ExportConfig, stage: Stage = logged_stage, transformer: nn.Module | None = None) -> Bundle:
    """Write the bundle that `config` asks for: whole, or not at all.

    But for plans: where one fails and nothing is at `config.out` yet, the bundle is written without that builder's
    plans, whole and valid as one that was exported without them, and the error says so.

    Args:
        config: what to export.
        stage: entered once for every stage of the work, to show progress.
        transformer: weights to export instead of those of `config.model`, whose other parts and shapes it takes: a
            module with adapters loaded, say. It is not changed.

    Raises:
        CheckpointError, ShapeError, SettingsError, EngineError, OutputError: see `cat_pruning.errors`.
    """
    # Before a checkpoint is downloaded.
    plans = wanted_plans(
        config.targets, plugin=config.plugin, refittable=config.refittable, quantization=config.quantization
    )
    prompts = _calibration_prompts(config)
    verification = Verification.of(config.verify, config.dtype, plans)
    checkpoint = find_checkpoint(
        config.model, revision=config.revision, random_weights=config.random_weights, loras=config.loras
    )
    if prompts and not checkpoint.components:
        raise CheckpointError(
            f"--calibrate: {config.model} has no text encoders, and so makes no images to calibrate by",
            "give a whole pipeline's directory, or --quantize int8 without --calibrate",
        )
    if transformer is not None:
        checkpoint = _with_weights_of(checkpoint, transformer, config)
    parts = wanted_parts(checkpoint, config.components)
    check_pipeline(checkpoint, folders_of(parts))
    for part in parts:
        weights, held = part_bytes(part.folder, config.dtype, verify=config.verify is not None)
        try:
            check_memory(weights, held_bytes=held, builds_plans=bool(plans))
        except EngineError as error:
            raise EngineError(
                f"{part.name}: {error.problem}", "leave it out of --components, or export on a larger machine"
            ) from error
    if config.controlnet:
        checkpoint = dataclasses.replace(checkpoint, family=checkpoint.family.with_residuals())
    geometry = _geometry(checkpoint, config.text_length)
    guidance = config.guidance and checkpoint.family.batched_guidance
    side = checkpoint.default_resolution
    profiles = tuple(
        profile_spec(height, width, prompts, geometry=geometry, settings=config.settings, guidance=guidance)
        for height, width in dict.fromkeys(config.resolutions or ((side, side),))
        for prompts in dict.fromkeys(config.prompts)
    )
    check_memory(
        checkpoint.num_parameters * config.dtype.num_bytes,
        held_bytes=_held_bytes(config, checkpoint),
        builds_plans=bool(plans),
    )
    needed = _needed_bytes(config, checkpoint, plans, parts)
    with new_bundle(config.out, force=config.force, needed_bytes=needed) as writer:
        with stage("Copy the pipeline's other parts"):
            pipeline = add_pipeline(checkpoint, writer.path / PIPELINE, folders_of(parts))
        components = export_components(
            parts, writer.path, config.dtype, geometry.text_length, stage, verify=config.verify is not None
        )
        plans = with_component_plans(plans, components)
        graphs, samples = _write_graphs(
            config, checkpoint, transformer, prompts, writer.path, profiles[0], verification, stage
        )
        shutil.copyfile(data_loader.__file__, writer.path / DATA_LOADER)
        with stage("Count MACs"):
            macs = tuple(profile_macs(writer.path, graphs, profile, geometry.patch_size) for profile in profiles)

        def verify(plans: Sequence[PlanSpec]) -> None:
            verification.check_plans(plans, samples, writer.path, graphs, stage)

        shapes: dict[Part | Component, list[PlanProfile]]
        shapes = {graph.part: plan_profiles(graph, profiles, geometry.patch_size) for graph in graphs}
        shapes |= {spec.component: component_profiles(spec, profiles) for spec in components}
        built, failure = build_plans(plans, shapes, writer, stage, verify)
        with stage("Hash and move into place"):
            bundle = writer.commit(
                Manifest(
                    family=checkpoint.family.name,
                    source=checkpoint.source,
                    transformer_class=checkpoint.family.transformer_class,
                    transformer_config=dict(checkpoint.family.config),
                    dtype=config.dtype,
                    quantization=config.quantization,
                    calibration=None if config.calibration is None else located(config.calibration),
                    unquantized=config.unquantized,
                    guidance=guidance,
                    settings=config.settings,
                    geometry=geometry,
                    graphs=graphs,
                    profiles=profiles,
                    components=components,
                    macs=macs,
                    plans=built,
                    pipeline=pipeline,
                    versions=_versions(built),
                )
            )
    if failure is not None:
        written = f"{bundle.path} was written without these plans and runs under ONNX Runtime or torch"
        raise EngineError(
            f"{failure.problem}; {written}",
            "; ".join(filter(None, (failure.remedy, "to build it anew, give --force"))),
        ) from failure
    return bundle


def _calibration_prompts(config: ExportConfig) -> list[str]:
    if config.calibration is None:
        return []
    prompts = [each.text for each in tuning_prompts(config.calibration)]
    if len(prompts) > MOST_CALIBRATION_PROMPTS:
        raise SettingsError(
            f"--calibrate {config.calibration}: {len(prompts)} prompts, of each of which an image would be made; "
            f"expected at most {MOST_CALIBRATION_PROMPTS}",
            "a handful is enough",
        )
    return prompts


def _with_weights_of(checkpoint: Checkpoint, transformer: Any, config: ExportConfig) -> Checkpoint:
    """The checkpoint with another transformer of its class, which lies in memory."""
    if config.loras:
        raise SettingsError(
            "loras are fused into weights that an export loads", "fuse them into the transformer yourself"
        )
    if type(transformer).__name__ != checkpoint.family.transformer_class:
        raise CheckpointError(
            f"the transformer is a {type(transformer).__name__}, {config.model} has a "
            f"{checkpoint.family.transformer_class}"
        )
    quantized = (name for name, each in transformer.named_parameters() if is_traceable_wrapper_subclass(each))
    if name := next(quantized, None):
        raise SettingsError(
            f"the transformer's {name} is a {type(transformer.get_parameter(name)).__name__}, not an ordinary tensor",
            "export the weights as they were before they were quantized; --quantize quantizes the step",
        )
    if (device := next(transformer.parameters()).device).type != "cpu":
        raise SettingsError(f"the transformer is on {device}", "an export traces it on the CPU: transformer.to('cpu')")
    if (dtype := next(transformer.parameters()).dtype) != config.dtype.torch:
        raise SettingsError(f"the transformer's weights are {dtype}, the export's dtype is {config.dtype}")
    check_weights(transformer, "the transformer", config.dtype)
    return dataclasses.replace(
        checkpoint,
        source=checkpoint.source.model_copy(update={"in_memory": True}),
        family=type(checkpoint.family)(config_of(transformer)),
        num_parameters=sum(parameter.numel() for parameter in transformer.parameters()),
    )


def profile_macs(directory: Path, graphs: Sequence[GraphSpec], profile: ProfileSpec, patch_size: int) -> MacsSpec:
    """The MACs of the graphs in `directory` at a profile."""
    full, pruned = step_dims(profile, patch_size)

    def count(part: Part, dims: StepDims) -> Macs:
        graph = next(graph for graph in graphs if graph.part is part)
        return count_macs(directory / graph.file, graph.input_shapes(dims))

    full_step = count(Part.STEP, full)
    pruned_step = count(Part.STEP, pruned) if pruned.num_kept else Macs(0, 0)
    return MacsSpec(
        profile=profile.name,
        full_linear=full_step.linear,
        full_attention=full_step.attention,
        pruned_linear=pruned_step.linear,
        pruned_attention=pruned_step.attention,
        prompt_linear=count(Part.PROMPT, full).linear,
        timestep_linear=count(Part.TIMESTEP, full).linear,
    )


def _geometry(checkpoint: Checkpoint, text_length: int | None) -> Geometry:
    family, possible = checkpoint.family, checkpoint.text_lengths
    if text_length is not None and text_length not in possible:
        raise SettingsError(
            f"--text-length {text_length}: the pipeline makes {possible.start} to {possible.stop - 1} text tokens, "
            f"{checkpoint.text_length} at its defaults",
            "give one of those, or leave it out",
        )
    return Geometry(
        pixels_per_latent=checkpoint.pixels_per_latent,
        patch_size=family.patch_size,
        latent_channels=family.latent_channels,
        max_latent_size=family.max_latent_size,
        text_length=text_length or checkpoint.text_length,
    )


def _held_bytes(config: ExportConfig, checkpoint: Checkpoint) -> int:
    """What is held of the transformer's weights; to calibrate, all, once, and those of the pipeline's other parts."""
    weights = checkpoint.num_parameters * config.dtype.num_bytes
    held = held_bytes(checkpoint, config.dtype, verify=config.verify is not None)
    if config.calibration is not None:
        held = max(held, weights) + sum(path.stat().st_size for path in copied_files(checkpoint))
    return held + quantizer_bytes(config.quantization, weights)


def _needed_bytes(
    config: ExportConfig, checkpoint: Checkpoint, plans: tuple[PlanSpec, ...], parts: Sequence[WantedPart]
) -> int:
    weights = checkpoint.num_parameters * config.dtype.num_bytes
    weights += sum(part_bytes(part.folder, config.dtype, verify=False)[0] for part in parts)
    flavours = len({plan.flavour for plan in plans})  # the plans hold the weights again
    others = sum(path.stat().st_size for path in copied_files(checkpoint, folders_of(parts)))
    copies = 1 + flavours + (config.quantization is not None)  # the step in fp32 and in integers, for a while
    return weights * copies + others + _SLACK_BYTES


def _write_graphs(
    config: ExportConfig,
    checkpoint: Checkpoint,
    transformer: nn.Module | None,
    prompts: Sequence[str],
    directory: Path,
    profile: ProfileSpec,
    verification: Verification,
    stage: Stage,
) -> tuple[tuple[GraphSpec, ...], Samples]:
    source, family, weights = checkpoint.source, checkpoint.family, None
    if transformer is None and source.kind == "random" and not config.verify:
        assert source.seed is not None
        transformer = hollow_transformer(family.transformer_class, dict(family.config), config.dtype)
        weights = RandomWeights(transformer, config.dtype, source.seed)
    elif transformer is None:
        with stage(f"Load {checkpoint.num_parameters / 1e6:,.1f} M parameters as {config.dtype}"):
            transformer = load_transformer(source, config.dtype)
    step = StepModule(transformer, family)
    with stage("Trace one step and write its graphs") as advance:
        graphs = export_step_graph(step, directory, advance, weights)
    check_patterns(directory, config.unquantized)
    samples = verification.sample(step, directory, profile, stage, for_plans=config.quantization is None)
    if config.quantization is not None:
        calibration = None
        if prompts:
            with stage(f"Make images to calibrate by; prompts: {len(prompts)}") as advance:
                pipeline = pipeline_of(source.model_copy(update={"in_memory": False}))
                calibration = calibrate(transformer, pipeline, family, config.dtype, prompts, profile, advance)
        with stage(f"Quantize the step to {config.quantization}"):
            ranges = calibration.ranges if calibration else None
            quantize_step(directory, config.quantization, ranges=ranges, unquantized=config.unquantized)
        samples = verification.check_quantized(step, directory, config.quantization, stage, calibration)
    del step, transformer
    gc.collect()  # frees the module before a builder needs the memory: hooks make reference cycles
    return tuple(graph_spec(part, graph) for part, graph in graphs.items()), samples


def graph_spec(part: Part, graph: Graph) -> GraphSpec:
    """A graph as the manifest has it."""
    inputs, outputs = (
        tuple(TensorSpec(name=name, dtype=spec.dtype.name, shape=spec.shape) for name, spec in tensors.items())
        for tensors in (graph.inputs, graph.outputs)
    )
    return GraphSpec(part=part, file=part.onnx, inputs=inputs, outputs=outputs)


def _versions(plans: tuple[PlanSpec, ...]) -> dict[str, str]:
    plan_versions: dict[str, str] = {plan.flavour: plan.version for plan in plans}
    return {"python": platform.python_version(), **versions_of(_VERSIONED), **plan_versions}
