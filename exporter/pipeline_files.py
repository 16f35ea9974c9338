"""The pipeline's other parts in a bundle: checked before the work, and copied."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from cat_pruning.bundle.schema import PipelineSpec
from cat_pruning.checkpoints.checkpoint import Checkpoint
from cat_pruning.checkpoints.parts import check_finite, check_parts
from cat_pruning.checkpoints.variants import variant_of, without_other_variants
from cat_pruning.errors import CheckpointError

# What a pipeline loads; single-file checkpoints, pickles and pictures beside it stay behind.
_PIPELINE_SUFFIXES = {".json", ".txt", ".model", ".safetensors"}


def check_pipeline(checkpoint: Checkpoint, graphs: Mapping[str, Path] | None = None) -> None:
    """Check that the parts that will be copied make a pipeline. Reads the headers of their weights only.

    Args:
        checkpoint: whose parts they are.
        graphs: the folders of parts that become graphs, by name.

    Raises:
        CheckpointError: they do not; see `load_parts`.
    """
    if checkpoint.directory is not None and copied_files(checkpoint, graphs):
        check_parts(_root(checkpoint.directory, graphs or {}), checkpoint.family.transformer_class)


def copied_files(checkpoint: Checkpoint, graphs: Mapping[str, Path] | None = None) -> list[Path]:
    """The files that a bundle gets of a checkpoint's pipeline: none of the hub's, which stay there, without graphs.

    Args:
        checkpoint: whose they are; the transformer's weights are not among them.
        graphs: the folders of parts that are graphs, by name: of those, only the config is.
    """
    graphs = graphs or {}
    if checkpoint.directory is None or not checkpoint.components or (checkpoint.source.kind == "hub" and not graphs):
        return []
    files = _files_of(checkpoint, _root(checkpoint.directory, graphs))
    return [path for path in files if path.parent.name not in graphs or path.name == "config.json"]


def _root(directory: Path, graphs: Mapping[str, Path]) -> Path:
    """Where the parts are: of the hub's, a snapshot that has them too."""
    return next((each.parent for each in graphs.values()), directory)


def _files_of(checkpoint: Checkpoint, root: Path) -> list[Path]:
    parts = [root / "model_index.json"]
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name in checkpoint.components):
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in _PIPELINE_SUFFIXES and path.is_file()]
        parts += without_other_variants(files)
    return [path for path in parts if path.parent.name != "transformer" or path.name == "config.json"]


def add_pipeline(checkpoint: Checkpoint, folder: Path, graphs: Mapping[str, Path]) -> PipelineSpec | None:
    """Copy the parts into a bundle's folder, or say where on the hub they are; None for a transformer alone.

    Args:
        checkpoint: whose parts they are.
        folder: of the bundle.
        graphs: the folders of parts that are graphs, by name: their configs are copied, not their weights.

    Raises:
        CheckpointError: a weight is not finite, or there are parts that no pipeline loads together.
    """
    if checkpoint.source.kind == "hub" and not graphs:
        return PipelineSpec(kind="hub", hub_id=checkpoint.source.location, revision=checkpoint.source.revision)
    if checkpoint.directory is None or not checkpoint.components:
        return None
    root, files = _root(checkpoint.directory, graphs), copied_files(checkpoint, graphs)
    for part in sorted({path.parent for path in files if path.suffix == ".safetensors"}):
        check_finite(part)
    for path in files:
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    variants = {variant for path in files if (variant := variant_of(path.name))}
    if len(variants) > 1:
        raise CheckpointError(
            f"{root} has some parts as {' and others as '.join(sorted(variants))} only",
            "no pipeline loads them together: save them all in one precision",
        )
    return PipelineSpec(kind="copied", path=folder.name, variant=variants.pop() if variants else None)
