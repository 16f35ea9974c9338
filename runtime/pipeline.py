"""A bundle as a ready diffusers pipeline."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.schedules import choose_schedule, read_schedules
from cat_pruning.checked import checked
from cat_pruning.checkpoints.hub import pipeline_snapshot
from cat_pruning.checkpoints.library_logs import first_line, quiet_diffusers
from cat_pruning.checkpoints.part_configs import check_together
from cat_pruning.checkpoints.parts import INDEX, check_finite, class_of_part, load_parts, read_object
from cat_pruning.components import AUTOENCODER, Component
from cat_pruning.dtype import torch_dtype_of
from cat_pruning.engines.graph_family import family_of_bundle
from cat_pruning.engines.step_engine import enough_memory
from cat_pruning.errors import BundleError, CheckpointError, SettingsError
from cat_pruning.imports import importing
from cat_pruning.installation import check_platform
from cat_pruning.runtime.components import engine_autoencoder, engine_text_encoder
from cat_pruning.runtime.engine_choice import component_engines, engine_from_bundle, open_signed
from cat_pruning.runtime.prompts import cache_prompts, offload_text
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings

if TYPE_CHECKING:
    from cat_pruning.engines.component_engine import ComponentEngine
    from cat_pruning.engines.step_engine import StepEngine


@checked
def load_pipeline(
    path: str | Path,
    engine: str = "auto",
    *,
    settings: PruneSettings | None = None,
    speedup: PositiveFloat | None = None,
    steps: PositiveInt | None = None,
    dtype: torch.dtype | str | None = None,
    cuda_graphs: bool = True,
    compiled: bool = False,
    public_key: str | Path | None = None,
    offload: Literal["text"] | None = None,
    prompt_cache_bytes: NonNegativeInt = 0,
) -> Any:
    """Load a bundle that `cat-export` wrote as the pipeline that it was exported from, on its engine's device.

    Other pipelines over the same parts come from it as always in diffusers:
    `StableDiffusion3Img2ImgPipeline(**pipe.components)`.

    Args:
        path: the bundle's directory, or a URL that fsspec knows, as hf://owner/name: a copy of it is pulled, whole or
            not at all, unless there is one already.
        engine: see `CatTransformer.from_bundle`.
        settings: instead of those that the bundle was exported with.
        speedup: take the bundle's schedule that makes images so many times as fast, by MACs: see `cat-tune`.
        steps: of that schedule, `num_inference_steps` of the calls; by default the pipeline's own default.
        dtype: of the pipeline's other parts, as torch.float16 or "fp16"; by default the engine's.
        cuda_graphs: see `CatTransformer.from_bundle`.
        compiled: see `CatTransformer.from_bundle`.
        public_key: a PEM file with the Ed25519 key that the bundle must be signed with, which is checked before
            anything else of it is read: see `cat-bundle sign`. Not with the engine torch, which loads the checkpoint.
        offload: "text" lets go of the text encoders' weights when an image's first step begins, and reads them again
            for the next prompt. For bundles whose text encoders are graphs.
        prompt_cache_bytes: keep so many bytes of what text encoders returned, and return it again for the same prompt.
            See `cache_prompts`.

    Raises:
        BundleError: no bundle, one that is truncated, edited, not signed or of another version, or one without a
            pipeline that can be loaded.
        EngineError: the engine cannot run here.
        CheckpointError: the pipeline's parts are on the hub, which cannot be reached.
        SettingsError: `settings` and `speedup` are both given, an argument is of another type, or the bundle cannot do
            what is asked for.
        ScheduleError: the bundle has no schedule of this speedup and number of steps.
    """
    check_platform()
    if settings is not None and speedup is not None:
        raise SettingsError("settings and speedup are both given", "give PruneSettings.tuned(schedule) or speedup")
    others_dtype = None if dtype is None else torch_dtype_of(dtype)
    bundle = open_signed(path, public_key, engine)
    schedules = read_schedules(bundle) if speedup is not None else {}
    parts = pipeline_directory(bundle)
    step_engine = _engine_beside_imports(bundle, parts, engine, cuda_graphs, compiled)
    transformer = CatTransformer(step_engine, settings or bundle.manifest.settings)
    engines = component_engines(bundle, step_engine.name)
    if bundle.manifest.components and not engines:
        from cat_pruning.checkpoints.checkpoint import pipeline_of

        parts = pipeline_of(bundle.manifest.source)  # the torch engine's transformer is the checkpoint's too
    if engines and others_dtype not in (None, step_engine.dtype):
        named = ", ".join(bundle.manifest.component_parts())
        raise SettingsError(
            f"dtype {dtype}: {named} are graphs in {bundle.manifest.dtype}",
            "leave dtype out, or export without them (cat-export --components)",
        )
    loaded = pipeline_parts(bundle, parts, others_dtype or transformer.dtype, with_graphs=not engines)
    # Made anew, because a pipeline reads sizes off its transformer and its autoencoder when it is made.
    made = _engine_parts(parts, engines, bundle.manifest.geometry.pixels_per_latent)
    pipe = type(loaded)(**{**loaded.components, **made, "transformer": transformer})
    _check_together(pipe, parts)
    if offload == "text":
        offload_text(pipe)
    if prompt_cache_bytes:
        cache_prompts(pipe, prompt_cache_bytes)
    if speedup is not None:
        steps = steps or inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
        schedule = choose_schedule(schedules, speedup, steps, tune=f"cat-tune {path}")
        transformer.settings = PruneSettings.tuned(schedule)
    with enough_memory(transformer.device, "the pipeline's other parts", "free memory on it, or give a smaller dtype"):
        return pipe.to(transformer.device)


def _engine_beside_imports(bundle: Bundle, parts: Path, engine: str, cuda_graphs: bool, compiled: bool) -> StepEngine:
    """The engine, loaded while another thread imports what the pipeline is made of.

    An engine is read, hashed and compiled outside Python, so both go on at once. This thread loads it, because it is
    this thread's CUDA device that it is for. The torch engine imports the same libraries itself, and so waits for them:
    two threads inside one library's circular imports can see halves of its modules.
    """
    with ThreadPoolExecutor(1, "cat-import") as pool:
        imports = pool.submit(import_pipeline, parts)
        if engine == "torch":
            imports.result()
        loaded = engine_from_bundle(bundle, engine, cuda_graphs=cuda_graphs, compiled=compiled)
        imports.result()
    return loaded


def import_pipeline(parts: Path) -> None:
    """Import the pipeline's class and its parts' own: what diffusers would import to load them, no more.

    What is wrong with the index is told when the parts are loaded.
    """
    with importing:
        import diffusers.pipelines.pipeline_utils

    try:
        index = read_object(parts, INDEX, f"{parts} is no diffusers pipeline")
    except CheckpointError:
        return
    with importing, quiet_diffusers():
        getattr(diffusers, str(index.get("_class_name")), None)
        for name, value in index.items():
            if isinstance(value, list) and name != "transformer" and value[:1] in (["diffusers"], ["transformers"]):
                getattr(importlib.import_module(value[0]), str(value[-1]), None)


def _engine_parts(
    directory: Path, engines: Mapping[Component, ComponentEngine], pixels_per_latent: int
) -> dict[str, Any]:
    """The parts of a pipeline that engines compute, by diffusers' names.

    Raises:
        BundleError: a part's config is not one of its class.
    """
    parts: dict[str, Any] = {}
    for component, engine in engines.items():
        name = component.pipeline_part
        if name in parts:
            continue
        folder = directory / name
        try:
            if name == AUTOENCODER:
                decoder, encoder = engines[Component.VAE_DECODER], engines[Component.VAE_ENCODER]
                parts[name] = engine_autoencoder(folder, decoder, encoder, pixels_per_latent)
            else:
                parts[name] = engine_text_encoder(folder, class_of_part(directory, name).__name__, engine)
        except (KeyError, ValueError, TypeError, OSError, CheckpointError) as error:
            raise BundleError(
                f"{folder} is no config of a part whose graph the bundle has ({first_line(error)})",
                "run cat-export again",
            ) from error
    return parts


def _check_together(pipe: Any, directory: Path) -> None:
    try:
        check_together(pipe, directory)
    except CheckpointError as error:
        raise BundleError(error.problem, error.remedy) from error


def pipeline_parts(
    bundle: Bundle, directory: Path, dtype: torch.dtype | None = None, *, with_graphs: bool = False
) -> Any:
    """The pipeline without its transformer, every weight of it one of the files'.

    Args:
        bundle: whose pipeline it is. Weights that an export copied, it has checked to be finite; those of the hub are
            checked here.
        directory: see `pipeline_directory`.
        dtype: of its modules; None for that of the files.
        with_graphs: load the parts that are graphs too, where the directory has their weights; else they are None.

    Raises:
        BundleError: it cannot be loaded.
    """
    without = () if with_graphs else bundle.manifest.component_parts()
    try:
        loaded = load_parts(directory, bundle.manifest.transformer_class, dtype, without)
        if bundle.manifest.pipeline is not None and bundle.manifest.pipeline.kind == "hub":
            for part in {path.parent for path in directory.glob("*/*.safetensors")}:
                check_finite(part)
    except CheckpointError as error:
        raise BundleError(
            f"the pipeline's other parts cannot be loaded: {error.problem}",
            "export again from a checkpoint that diffusers itself loads",
        ) from error
    _check_text_length(bundle, directory)
    return loaded


def _check_text_length(bundle: Bundle, directory: Path) -> None:
    """Check that the pipeline, whose tokenizers have been loaded, makes texts as long as the manifest says."""
    length = bundle.manifest.geometry.text_length
    lengths = family_of_bundle(bundle).pipeline_text_lengths(directory)
    if length not in lengths:
        raise BundleError(
            f"{bundle.path} was edited or is damaged: geometry.text_length is {length}, its pipeline makes "
            f"{lengths[0]} to {lengths[-1]} text tokens",
            "run cat-export again, with another --text-length or none",
        )


def pipeline_directory(bundle: Bundle, *, download: bool = True) -> Path:
    """Where the pipeline's other parts are, verified; downloaded if they are on the hub.

    Args:
        bundle: whose pipeline it is.
        download: if false, the hub is not asked, and what is in the local cache may be incomplete.

    Raises:
        BundleError: it has none, or they were changed.
        CheckpointError: the hub cannot be reached, or nothing is in the local cache.
    """
    spec = bundle.manifest.pipeline
    if spec is None:
        raise BundleError(
            f"{bundle.path} was exported with random weights and has no text encoders, VAE or scheduler",
            "use CatTransformer.from_bundle in a pipeline of your own",
        )
    if spec.kind == "copied":
        assert spec.path is not None
        return bundle.verified_tree(spec.path)
    assert spec.hub_id is not None
    return pipeline_snapshot(spec.hub_id, spec.revision, download=download)
