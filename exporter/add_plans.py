"""Plans for another GPU or another version, built later from a bundle's own graphs and added beside those it has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cat_pruning.bundle.bundle import Bundle, beside_bundle
from cat_pruning.bundle.changes import Change, change_bundle
from cat_pruning.bundle.manifest import Manifest
from cat_pruning.bundle.plan_sets import plan_sets
from cat_pruning.bundle.profiles import component_profiles, plan_profiles
from cat_pruning.bundle.schema import PlanSpec
from cat_pruning.engines.plan_caches import timing_cache_path
from cat_pruning.errors import EngineError, OutputError, SettingsError
from cat_pruning.exporter.memory import check_memory
from cat_pruning.exporter.plans import build_one, wanted_plans, with_component_plans
from cat_pruning.exporter.progress import Stage, logged_stage
from cat_pruning.names import Target
from cat_pruning.step_io import Part


def add_plans(
    directory: Path,
    targets: Sequence[Target],
    *,
    plugin: bool = True,
    refittable: bool = False,
    stage: Stage = logged_stage,
) -> Bundle:
    """Build plans from a bundle's graphs and put them into it: all of them, or none; see `change_bundle`.

    They are for the bundle's own profiles and for this machine's versions and GPU. They are built beside the bundle,
    which can be loaded meanwhile. The checkpoint is not needed.

    Args:
        directory: the bundle's.
        targets: TensorRT, TensorRT-RTX, or both; `Target.ONNX` is there already.
        plugin: as `ExportConfig` has it.
        refittable: likewise.
        stage: entered once for every stage of the work, to show progress.

    Returns:
        The bundle with the new plans last.

    Raises:
        BundleError: there is no bundle, or its graphs are not what was exported.
        EngineError: a plan cannot be built here.
        OutputError: the bundle cannot be written, or was replaced meanwhile.
        SettingsError: it has such plans already or is quantized, or nothing is asked for.
    """
    bundle = Bundle.open(directory)
    quantization = bundle.manifest.quantization
    if quantization is not None and not quantization.is_calibrated:
        raise SettingsError(
            f"--add-plans: the step of {bundle.path} is in {quantization}, and no plans are built from it",
            "export one without quantization, or with --calibrate",
        )
    of_step = wanted_plans(targets, plugin=plugin, refittable=refittable, quantization=quantization)
    plans = with_component_plans(of_step, bundle.manifest.components)
    if not plans:
        raise SettingsError("--add-plans: no plans to build", "give --target tensorrt or --target tensorrt_rtx")
    _check_new(bundle, bundle.manifest, plans)
    weights = _graph_bytes(bundle.manifest)
    try:
        check_memory(weights, held_bytes=0, builds_plans=True)
    except EngineError as error:
        raise EngineError(error.problem, "add the plans on a larger machine") from error
    with stage("Hash the graphs"):
        for graph in bundle.manifest.every_graph():
            bundle.verify_graph(graph.file)
    with beside_bundle(bundle.path, needed_bytes=weights * len({plan.flavour for plan in plans})) as folder:
        built = tuple(_build(bundle, plan, folder / plan.file, stage) for plan in plans)
        with stage("Hash and move into place"):
            return change_bundle(bundle.path, lambda manifest: _addition(bundle, manifest, built, folder))


def _build(bundle: Bundle, plan: PlanSpec, file: Path, stage: Stage) -> PlanSpec:
    manifest, part = bundle.manifest, plan.part
    if isinstance(part, Part):
        shapes = plan_profiles(manifest.graph(part), manifest.profiles, manifest.geometry.patch_size)
    else:
        shapes = component_profiles(manifest.component(part), manifest.profiles)
    return build_one(plan, bundle.path / part.onnx, file, shapes, timing_cache_path(bundle.path, plan), stage)


def _addition(bundle: Bundle, manifest: Manifest, built: tuple[PlanSpec, ...], folder: Path) -> Change:
    if manifest.digest != bundle.manifest.digest:
        raise OutputError(
            f"{bundle.path} was replaced by another export meanwhile, which these plans were not built from",
            "add them again",
        )
    _check_new(bundle, manifest, built)
    return Change(fields={"plans": (*manifest.plans, *built)}, added={plan.file: folder / plan.file for plan in built})


def _check_new(bundle: Bundle, manifest: Manifest, plans: Sequence[PlanSpec]) -> None:
    files = {plan.file for plan in plans}
    for each in plan_sets(manifest.plans):
        if any(plan.file in files for plan in each.plans):
            raise SettingsError(
                f"{bundle.path} has plans of {each.title} already",
                f"to build them anew, drop those first: cat-bundle prune {bundle.path} --plans {each.name}",
            )


def _graph_bytes(manifest: Manifest) -> int:
    """The size of the graphs with their weights, which a plan holds again."""
    graphs = tuple(graph.file for graph in manifest.every_graph())
    return sum(spec.size for name, spec in manifest.files.items() if name.startswith(graphs))
