"""Whether a bundle's graphs are those of the family and the config that its manifest names."""

from __future__ import annotations

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.errors import BundleError, CheckpointError
from cat_pruning.families import family_named
from cat_pruning.families.family import Family
from cat_pruning.step_io import SYMBOLIC, Part, cache_names, is_residual


def family_of_bundle(bundle: Bundle) -> Family:
    """The family of a bundle, bound to the config in its manifest, whose steps are what the graphs compute.

    Raises:
        BundleError: the family is not known, the config is not one of it, or the graphs are another model's.
    """
    manifest = bundle.manifest
    again = f"run cat-export again: {bundle.export_command()}"
    try:
        family = family_named(manifest.family, manifest.transformer_config)
    except CheckpointError as error:
        raise BundleError(f"{bundle.path}: {error.problem}", again) from error
    if (fault := _fault(bundle, family)) is not None:
        raise BundleError(f"{bundle.path} was edited or is damaged: {fault}", again)
    return family


def _fault(bundle: Bundle, family: Family) -> str | None:
    manifest = bundle.manifest
    if manifest.transformer_class != family.transformer_class:
        return f"its family {family.name} is not that of a {manifest.transformer_class}"
    takes_residuals = any(is_residual(tensor.name) for tensor in manifest.graph(Part.STEP).inputs)
    exported = family.with_residuals() if takes_residuals and family.num_residuals else family
    shapes = exported.step_shapes(SYMBOLIC)
    states = {tensor.name for graph in manifest.graphs if graph.part is not Part.STEP for tensor in graph.outputs}
    for graph in manifest.graphs:
        for tensor in graph.inputs:
            if tensor.name not in states and shapes.get(tensor.name) != tensor.shape:
                has = f"has {_named(shapes[tensor.name])}" if tensor.name in shapes else "has no such input"
                return (
                    f"{graph.file} reads {tensor.name} of shape {_named(tensor.shape)}, a "
                    f"{family.transformer_class} of its config {has}"
                )
    read = {tensor.name for tensor in manifest.graph(Part.STEP).inputs}
    if missing := [name for name in cache_names(len(family.caches())) if name not in read]:
        return f"{manifest.graph(Part.STEP).file} has no {missing[0]}, which a layer of its config has"
    return None


def _named(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
