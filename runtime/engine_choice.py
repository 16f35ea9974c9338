"""Which step engine runs a bundle on this machine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.places import is_url
from cat_pruning.bundle.pulling import local_copy
from cat_pruning.bundle.schema import ComponentSpec, PlanSpec
from cat_pruning.bundle.signatures import PublicKey
from cat_pruning.components import Component
from cat_pruning.engines.component_engine import ComponentEngine, Runner
from cat_pruning.engines.gpu import gpu_architecture, missing_gpu
from cat_pruning.engines.graph_family import family_of_bundle
from cat_pruning.engines.graph_weights import GraphWeights
from cat_pruning.engines.plan_caches import runtime_cache_path
from cat_pruning.engines.plan_choice import plans_for
from cat_pruning.engines.step_engine import StepEngine, enough_memory
from cat_pruning.engines.tensorrt_library import tensorrt_library
from cat_pruning.errors import BundleError, EngineError, SettingsError
from cat_pruning.families.family import Family
from cat_pruning.imports import importing
from cat_pruning.names import ENGINES, FLAVOURS, TITLES, Flavour
from cat_pruning.step_io import Part

logger = logging.getLogger(__name__)


def engine_from_bundle(
    bundle: Bundle, engine: str = "auto", *, cuda_graphs: bool = True, compiled: bool = False
) -> StepEngine:
    """Load the engine called `engine` on this machine's GPU, or on the CPU where it has none.

    "auto" takes TensorRT's plans if the bundle has some for this GPU, else TensorRT-RTX's, else ONNX Runtime.

    Args:
        bundle: what to load.
        engine: one of `ENGINES`.
        cuda_graphs: capture steps and replay them as one launch, where the engine can.
        compiled: of the torch engine: see `TorchStepEngine`.

    Raises:
        EngineError: no engine of this name, or one that cannot run here; what is missing, and what to do.
        BundleError: a file of the bundle was changed, or its graphs are not its family's.
        CheckpointError: the torch engine's checkpoint is not where the export found it.
    """
    family = family_of_bundle(bundle)
    if engine not in ENGINES:
        raise EngineError(f"engine {engine!r} is not known; known are {', '.join(ENGINES)}")
    if engine == "auto":
        engine = best_engine(bundle)
    if compiled and engine != "torch":
        raise EngineError(f"compiled: torch.compile has no use for the engine {engine}", "leave it out, or take torch")
    for flavour in FLAVOURS:
        if engine == flavour:
            return _tensorrt(bundle, family, flavour, cuda_graphs)
    if engine == "onnxruntime":
        return _onnxruntime(bundle, family)
    with importing:
        from cat_pruning.checkpoints.checkpoint import load_transformer
    from cat_pruning.engines.torch_engine import TorchStepEngine

    transformer, device = load_transformer(bundle.manifest.source, bundle.manifest.dtype), _device()
    with enough_memory(device, "the transformer", "free memory on it, or export with a smaller --dtype"):
        return TorchStepEngine(transformer.to(device), cuda_graphs=cuda_graphs, compiled=compiled)


def open_signed(path: str | Path, public_key: str | Path | None, engine: str) -> Bundle:
    """A bundle, whose signature is checked before anything else of it is read, where a key is given.

    Args:
        path: its directory, or a URL, of which a copy is pulled: see `local_copy`.
        public_key: the PEM file of the key.
        engine: that it is opened for.

    Raises:
        BundleError: as `Bundle.open`.
        InstallationError, OutputError, SettingsError: as `PublicKey.read` and `local_copy`; also for the engine torch.
    """
    key = None if public_key is None else PublicKey.read(public_key)
    if key is not None and engine == "torch":
        raise SettingsError(
            "a public key and the engine torch: it loads the checkpoint, which is not in the bundle and not signed",
            "take another engine",
        )
    return Bundle.open(local_copy(str(path), key) if is_url(path) else path, key)


def best_engine(bundle: Bundle) -> str:
    """What "auto" takes."""
    if not torch.cuda.is_available():
        return "onnxruntime"
    for flavour in FLAVOURS:
        try:
            plans_for(bundle, flavour, version=tensorrt_library(flavour).__version__, architecture=gpu_architecture())
        except EngineError as error:
            logger.info("not %s: %s", TITLES[flavour], error)
        else:
            return flavour
    return "onnxruntime"


def component_engines(bundle: Bundle, engine: str) -> dict[Component, ComponentEngine]:
    """The engines of a bundle's components, none of them loaded; none beside the torch engine.

    Args:
        bundle: with any components.
        engine: the name of the step's engine, not "auto".

    Raises:
        EngineError: there are no plans of them for this machine.
    """
    manifest = bundle.manifest
    if not manifest.components or engine == "torch":
        return {}
    device = onnxruntime_device() if engine == "onnxruntime" else _device()
    loads: dict[Component, Callable[[], Runner]]
    if engine == "onnxruntime":
        loads = {
            spec.component: functools.partial(_component_graph, bundle, spec, device) for spec in manifest.components
        }
    else:
        flavour = next(each for each in FLAVOURS if each == engine)
        version = tensorrt_library(flavour).__version__
        plans = plans_for(bundle, flavour, version=version, architecture=gpu_architecture())
        loads = {
            spec.component: functools.partial(_component_plan, bundle, spec, plans[spec.component], device)
            for spec in manifest.components
        }
    return {
        spec.component: ComponentEngine(spec, loads[spec.component], manifest.dtype, device)
        for spec in manifest.components
    }


def _component_graph(bundle: Bundle, spec: ComponentSpec, device: torch.device) -> Runner:
    from cat_pruning.engines.onnxruntime_component import OnnxRuntimeComponent

    path = bundle.verify_graph(spec.file)
    return OnnxRuntimeComponent(spec, path, device, bundle.manifest.geometry.pixels_per_latent)


def _component_plan(bundle: Bundle, spec: ComponentSpec, plan: PlanSpec, device: torch.device) -> Runner:
    from cat_pruning.engines.plan import Plan
    from cat_pruning.engines.plan_component import PlanComponent

    loaded = Plan(plan.flavour, bundle.verified(plan.file), device, runtime_cache_path(bundle.path, plan))
    return PlanComponent(spec, loaded, device, bundle.manifest.geometry.pixels_per_latent)


def _tensorrt(bundle: Bundle, family: Family, flavour: Flavour, cuda_graphs: bool) -> StepEngine:
    from cat_pruning.engines.plan import Plan
    from cat_pruning.engines.tensorrt_engine import TensorRTStepEngine

    manifest, version = bundle.manifest, tensorrt_library(flavour).__version__
    if not torch.cuda.is_available():
        raise EngineError(f"{TITLES[flavour]} runs on an NVIDIA GPU, and torch can use none here ({missing_gpu()})")
    found = plans_for(bundle, flavour, version=version, architecture=gpu_architecture())
    specs = {part: found[part] for part in Part}
    plans = {
        part: Plan(flavour, bundle.verified(spec.file), _device(), runtime_cache_path(bundle.path, spec))
        for part, spec in specs.items()
    }
    return TensorRTStepEngine(
        flavour,
        plans,
        specs[Part.STEP].token_ops,
        manifest.graphs,
        family=family,
        dtype=manifest.dtype.torch,
        device=_device(),
        rebuild=bundle.export_command(flavour),
        cuda_graphs=cuda_graphs,
        weights=functools.partial(_weights, bundle) if all(spec.refittable for spec in specs.values()) else None,
    )


def _onnxruntime(bundle: Bundle, family: Family) -> StepEngine:
    from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine

    manifest, device = bundle.manifest, onnxruntime_device()
    if device != _device():
        logger.warning(
            "there is a GPU, but this ONNX Runtime has no CUDA provider and runs on the CPU; pip install "
            "onnxruntime-gpu in its place, build plans for the GPU (%s), or take the engine torch",
            bundle.add_plans_command("tensorrt"),
        )
    bundle.verify_graphs()
    weights = functools.partial(_weights, bundle)
    engine = OnnxRuntimeStepEngine(bundle.path, family, manifest.dtype.torch, device, weights)
    for graph in manifest.graphs:
        expected = ({tensor.name for tensor in graph.inputs}, {tensor.name for tensor in graph.outputs})
        loaded = engine.graphs[graph.part]
        if ({value.name for value in loaded.get_inputs()}, {value.name for value in loaded.get_outputs()}) != expected:
            raise BundleError(
                f"{bundle.path / graph.file} has other inputs or outputs than the manifest says",
                f"run cat-export again: {bundle.export_command()}",
            )
    return engine


def _weights(bundle: Bundle) -> GraphWeights:
    """What the export wrote, verified. Raises an `EngineError` if that is integers, which nothing can be added to."""
    if (quantization := bundle.manifest.quantization) is not None:
        raise EngineError(
            f"the step of {bundle.path} is in {quantization}, which no adapter can be added to",
            f"fuse the adapter in an export: {bundle.export_command()} --lora PATH",
        )
    bundle.verify_graphs()
    return GraphWeights(bundle.path)


def onnxruntime_device() -> torch.device:
    """Where ONNX Runtime computes: on the GPU if there is one and this build has a provider for it."""
    import onnxruntime

    has_provider = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return _device() if has_provider else torch.device("cpu")


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
