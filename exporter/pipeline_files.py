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


def check_pipeline(checkpoint: Checkpoint) -> None:
    """Check that the parts that will be copied make a pipeline. Reads the headers of their weights only.

    Raises:
        CheckpointError: they do not; see `load_parts`.
    """
    if checkpoint.directory is not None and pipeline_files(checkpoint):
        check_parts(checkpoint.directory, checkpoint.family.transformer_class)


def pipeline_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of a local checkpoint that make its pipeline, but for the transformer's weights."""
    if checkpoint.directory is None or checkpoint.source.kind == "hub" or not checkpoint.components:
        return []
    return _files_of(checkpoint, checkpoint.directory)


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
    root = next((each.parent for each in graphs.values()), checkpoint.directory)
    files = [
        path for path in _files_of(checkpoint, root) if path.parent.name not in graphs or path.name == "config.json"
    ]
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
