"""CAT Pruning (Cheng, Chen, Jia; arXiv 2502.00433) for deployment.

    PruneSettings      what to compute on which step
    Schedule           the same as a table, fitted to a model by `cat-tune`
    CatTransformer     stands in for `pipe.transformer` of a diffusers pipeline
    load_pipeline      a bundle written by `cat-export` as a ready diffusers pipeline

The names are imported on first use, so that `import cat_pruning` costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cat_pruning.runtime.pipeline import load_pipeline
    from cat_pruning.runtime.transformer import CatTransformer
    from cat_pruning.schedule import Schedule
    from cat_pruning.settings import PruneSettings

# ONNX Runtime reads it once, when it is first imported: every module of ours that does so is imported after this line.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["CatTransformer", "PruneSettings", "Schedule", "load_pipeline"]

_HOME = {
    "CatTransformer": "cat_pruning.runtime.transformer",
    "PruneSettings": "cat_pruning.settings",
    "Schedule": "cat_pruning.schedule",
    "load_pipeline": "cat_pruning.runtime.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
