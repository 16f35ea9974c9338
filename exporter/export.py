"""From `--model` to a bundle: the steps of an export, in order."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from cat_pruning import step_io
from cat_pruning.dtype import DType
from cat_pruning.engines.build import build_rtx_plan, can_build_rtx, rtx_plan_spec
from cat_pruning.engines.bundle import Bundle, new_bundle
from cat_pruning.engines.manifest import (
    CacheSpec,
    Geometry,
    MacsSpec,
    Manifest,
    PipelineSpec,
    PlanSpec,
    ProfileSpec,
)
from cat_pruning.engines.profiles import profile_spec, step_dims
from cat_pruning.errors import EngineError, SettingsError
from cat_pruning.exporter.checkpoint import Checkpoint, find_checkpoint, load_transformer
from cat_pruning.exporter.interception import StepModule
from cat_pruning.exporter.macs import count_macs
from cat_pruning.exporter.step_graph import export_step_graph
from cat_pruning.exporter.verify import verify_step_graph
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Shape

logger = logging.getLogger(__name__)

Advance = Callable[[int, int], None]  # (done, total)
Stage = Callable[[str], AbstractContextManager[Advance]]  # title -> a stage of the export, while it runs

STEP_ONNX = "step.onnx"
PIPELINE = "pipeline"
_SLACK_BYTES = 64 << 20  # graphs, manifest, what a file system needs itself
# What a pipeline loads; single-file checkpoints, pickles and pictures beside it stay behind.
_PIPELINE_SUFFIXES = {".json", ".txt", ".model", ".safetensors"}
_VERSIONED = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "cat-pruning")


class Target(StrEnum):
    """What an export builds; step.onnx always, and plans from it."""

    ONNX = "onnx"
    RTX = "rtx"
    TENSORRT = "tensorrt"


def default_targets() -> tuple[Target, ...]:
    """What this machine can build."""
    return (Target.ONNX, Target.RTX) if can_build_rtx() else (Target.ONNX,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """What `cat-export` was asked for.

    model, revision, random_weights: see `find_checkpoint`. out: the bundle's directory; force replaces a bundle there.
    resolutions: (height, width) in pixels; empty for the model's own. prompts: numbers of prompts in a batch.
    text_length: text rows of the profiles; None for what the pipeline passes at its defaults.
    guidance: classifier-free guidance doubles the rows of a batch. verify: compare ONNX Runtime with torch.
    """

    model: str
    out: Path
    revision: str | None = None
    random_weights: bool = False
    dtype: DType = DType.FP32
    resolutions: tuple[tuple[int, int], ...] = ()
    prompts: tuple[int, ...] = (1,)
    text_length: int | None = None
    guidance: bool = True
    settings: PruneSettings = field(default_factory=PruneSettings)
    targets: tuple[Target, ...] = field(default_factory=default_targets)
    verify: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if not self.prompts or any(prompts < 1 for prompts in self.prompts):
            raise SettingsError(f"--batch {' '.join(map(str, self.prompts))}: expected numbers of prompts >= 1")
        if self.text_length is not None and self.text_length < 1:
            raise SettingsError(f"--text-length {self.text_length}: expected a number of text tokens >= 1")
        if Target.TENSORRT in self.targets:
            raise EngineError(
                "--target tensorrt: this version builds no TensorRT plans yet; "
                "--target rtx builds a TensorRT-RTX plan on any machine"
            )
        if self.verify and self.dtype is DType.BF16:
            raise EngineError(
                "--verify: ONNX Runtime's CPU provider does not compute in bf16; verify with --dtype fp32"
            )


@contextmanager
def logged_stage(title: str) -> Iterator[Advance]:
    """Stages as lines of the log."""
    logger.info(title)
    yield lambda done, total: None


def export(config: ExportConfig, stage: Stage = logged_stage) -> Bundle:
    """Write the bundle that `config` asks for: whole, or not at all.

    Args:
        config: what to export.
        stage: entered once for every stage of the work, to show progress.

    Raises:
        CheckpointError, ShapeError, SettingsError, EngineError, OutputError: see `cat_pruning.errors`.
    """
    checkpoint = find_checkpoint(config.model, revision=config.revision, random_weights=config.random_weights)
    geometry = _geometry(checkpoint, config.text_length)
    side = checkpoint.default_resolution
    profiles = tuple(
        profile_spec(height, width, prompts, geometry=geometry, settings=config.settings, guidance=config.guidance)
        for height, width in dict.fromkeys(config.resolutions or ((side, side),))
        for prompts in dict.fromkeys(config.prompts)
    )
    plans = (rtx_plan_spec(),) if Target.RTX in config.targets else ()
    with new_bundle(config.out, force=config.force, needed_bytes=_needed_bytes(config, checkpoint)) as writer:
        step_onnx = writer.path / STEP_ONNX
        _write_step_graph(config, checkpoint, step_onnx, stage)
        with stage("Count MACs"):
            macs = tuple(_count(checkpoint, step_onnx, profile, geometry) for profile in profiles)
        for plan in plans:
            with stage(f"Build the TensorRT-RTX engine, {2 * len(profiles)} profiles"):
                build_rtx_plan(step_onnx, writer.path / plan.file, _plan_shapes(checkpoint, profiles))
        with stage("Copy the pipeline's other parts"):
            pipeline = _add_pipeline(checkpoint, writer.path / PIPELINE)
        with stage("Hash and move into place"):
            return writer.commit(
                Manifest(
                    family=checkpoint.family.name,
                    source=checkpoint.source,
                    transformer_class=checkpoint.family.transformer_class,
                    transformer_config=checkpoint.config,
                    dtype=config.dtype,
                    guidance=config.guidance,
                    settings=config.settings,
                    geometry=geometry,
                    caches=_cache_specs(checkpoint),
                    profiles=profiles,
                    macs=macs,
                    plans=plans,
                    pipeline=pipeline,
                    versions=_versions(plans),
                )
            )


def _geometry(checkpoint: Checkpoint, text_length: int | None) -> Geometry:
    return Geometry(
        pixels_per_latent=checkpoint.pixels_per_latent,
        patch_size=checkpoint.config["patch_size"],
        latent_channels=checkpoint.config["in_channels"],
        max_latent_size=checkpoint.family.max_latent_size(checkpoint.config),
        text_length=text_length or checkpoint.text_length,
    )


def _needed_bytes(config: ExportConfig, checkpoint: Checkpoint) -> int:
    weights = checkpoint.num_parameters * config.dtype.num_bytes
    copies = 2 if Target.RTX in config.targets else 1  # the plan holds the weights again
    parts = sum(path.stat().st_size for path in _pipeline_files(checkpoint))
    return weights * copies + parts + _SLACK_BYTES


def _write_step_graph(config: ExportConfig, checkpoint: Checkpoint, step_onnx: Path, stage: Stage) -> None:
    with stage(f"Load {checkpoint.num_parameters / 1e6:,.1f} M parameters as {config.dtype}"):
        step = StepModule(load_transformer(checkpoint.source, config.dtype), checkpoint.family)
    with stage("Trace one step and write step.onnx") as advance:
        export_step_graph(step, step_onnx, advance)
    if config.verify:
        with stage("Compare ONNX Runtime with torch"):
            verify_step_graph(step, step_onnx, config.dtype)
    del step
    gc.collect()  # before a builder needs the memory; modules with hooks are cycles


def _count(checkpoint: Checkpoint, step_onnx: Path, profile: ProfileSpec, geometry: Geometry) -> MacsSpec:
    full, pruned = (
        count_macs(step_onnx, checkpoint.family.step_shapes(checkpoint.config, dims))
        for dims in step_dims(profile, geometry.patch_size)
    )
    return MacsSpec(
        profile=profile.name,
        full_linear=full.linear,
        full_attention=full.attention,
        pruned_linear=pruned.linear,
        pruned_attention=pruned.attention,
    )


def _plan_shapes(checkpoint: Checkpoint, profiles: tuple[ProfileSpec, ...]) -> list[dict[str, Shape]]:
    return [
        checkpoint.family.step_shapes(checkpoint.config, dims)
        for profile in profiles
        for dims in step_dims(profile, checkpoint.config["patch_size"])
    ]


def _cache_specs(checkpoint: Checkpoint) -> tuple[CacheSpec, ...]:
    specs = checkpoint.family.caches(checkpoint.config)
    names = step_io.cache_names(len(specs))
    both = (spec for spec in specs for _ in range(2))
    return tuple(
        CacheSpec(name=name, rows=spec.rows.value, width=spec.width) for name, spec in zip(names, both, strict=True)
    )


def _pipeline_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of a local checkpoint that make its pipeline, but for the transformer's weights."""
    if checkpoint.directory is None or checkpoint.source.kind == "hub":
        return []
    root = checkpoint.directory
    parts = [root / "model_index.json"]
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name in checkpoint.components):
        parts += [path for path in sorted(folder.rglob("*")) if path.suffix in _PIPELINE_SUFFIXES and path.is_file()]
    plain = [path for path in parts if ".fp16." not in path.name or not path.with_name(_plain_name(path)).exists()]
    return [path for path in plain if path.parent.name != "transformer" or path.name == "config.json"]


def _plain_name(path: Path) -> str:
    return path.name.replace(".fp16.", ".")


def _add_pipeline(checkpoint: Checkpoint, folder: Path) -> PipelineSpec | None:
    if checkpoint.source.kind == "hub":
        return PipelineSpec(kind="hub", hub_id=checkpoint.source.location, revision=checkpoint.source.revision)
    if checkpoint.directory is None:
        return None
    for path in _pipeline_files(checkpoint):
        target = folder / path.relative_to(checkpoint.directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return PipelineSpec(kind="copied", path=folder.name)


def _versions(plans: tuple[PlanSpec, ...]) -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {"python": platform.python_version(), **versions} | {plan.flavour: plan.version for plan in plans}
