"""Which step engine runs a bundle on this machine."""

from __future__ import annotations

from cat_pruning.engines.bundle import Bundle
from cat_pruning.errors import EngineError
from cat_pruning.exporter.checkpoint import load_transformer
from cat_pruning.exporter.families import family_named
from cat_pruning.runtime.step_engine import StepEngine

ENGINES = ("auto", "onnxruntime", "torch")


def engine_from_bundle(bundle: Bundle, engine: str = "auto") -> StepEngine:
    """Load the engine called `engine`; "auto" takes ONNX Runtime, the default where there is no GPU.

    Raises:
        EngineError: no engine of this name, or one that cannot run here.
        BundleError: a file of the bundle was changed.
        CheckpointError: the torch engine's checkpoint is not where the export found it.
    """
    manifest = bundle.manifest
    if engine in ("auto", "onnxruntime"):
        from cat_pruning.runtime.onnxruntime_engine import OnnxRuntimeStepEngine

        for graph in manifest.graphs:
            bundle.verified(graph.file)
            if (weights := f"{graph.file}.data") in manifest.files:
                bundle.verified(weights)
        return OnnxRuntimeStepEngine(
            bundle.path, family_named(manifest.family), manifest.transformer_config, manifest.dtype.torch
        )
    if engine == "torch":
        from cat_pruning.runtime.torch_engine import TorchStepEngine

        return TorchStepEngine(load_transformer(manifest.source, manifest.dtype))
    raise EngineError(f"engine {engine!r} is not known; known are {', '.join(ENGINES)}")
