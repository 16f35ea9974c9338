"""The plans of a bundle: what the importer may refuse is told first, and what was exported outlives a failure."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from cat_pruning.bundle.bundle import BundleWriter
from cat_pruning.bundle.plan_sets import plan_sets
from cat_pruning.bundle.profiles import PlanProfile
from cat_pruning.bundle.schema import ComponentSpec, PlanSpec, TokenOps
from cat_pruning.components import Component
from cat_pruning.engines.builder.build import build_plan, plan_specs, with_report
from cat_pruning.engines.plan_caches import timing_cache_path
from cat_pruning.errors import EngineError, SettingsError
from cat_pruning.exporter.importer_rules import importer_findings
from cat_pruning.exporter.progress import Stage
from cat_pruning.names import FLAVOURS, TITLES, Flavour, Quantization
from cat_pruning.step_io import Part

logger = logging.getLogger(__name__)


def wanted_plans(
    targets: Collection[str], *, plugin: bool, refittable: bool, quantization: Quantization | None = None
) -> tuple[PlanSpec, ...]:
    """What is built for some targets, in the order of `FLAVOURS`.

    Args:
        targets: names of `Target`.
        plugin: our kernels for the token operators of TensorRT's plans.
        refittable: see `plan_specs`.
        quantization: of the step that they are built from.

    Raises:
        EngineError: as `plan_specs`.
        SettingsError: refittable plans of weights in eight bits.
    """
    if refittable and quantization is not None:
        raise SettingsError(
            f"--refittable: the step is in {quantization}, which no adapter can be added to",
            "fuse the adapter with --lora, or leave out --quantize",
        )
    fp8 = quantization is Quantization.FP8
    token_ops: dict[Flavour, TokenOps] = {"tensorrt": "plugin" if plugin else "function"}
    return tuple(
        plan
        for flavour in FLAVOURS
        if flavour in targets
        for plan in plan_specs(flavour, token_ops.get(flavour, "function"), refittable=refittable, fp8=fp8)
    )


def build_one(
    plan: PlanSpec, onnx: Path, file: Path, shapes: Sequence[PlanProfile], timings: Path, stage: Stage
) -> PlanSpec:
    """Build one plan from a graph, and return its record with what the build found out.

    Raises:
        EngineError, OSError: as `build_plan`.
    """
    title = TITLES[plan.flavour]
    for finding in importer_findings(onnx):
        logger.warning("%s may be refused by %s: %s", onnx.name, title, finding)
    with stage(f"Build the {title} engine of {onnx.name}, profiles: {len(shapes)}"):
        return with_report(plan, build_plan(plan, onnx, file, shapes, timings))


def with_component_plans(plans: Sequence[PlanSpec], components: Sequence[ComponentSpec]) -> tuple[PlanSpec, ...]:
    """The plans of the step's graphs, each set of them followed by those of the components, as they are built alike."""
    found = list(plans)
    for each in reversed(plan_sets(plans)):
        last = each.plans[-1]
        folder = last.file.rpartition("/")[0]
        place = found.index(last) + 1
        found[place:place] = [
            last.model_copy(
                update={
                    "part": spec.component,
                    "token_ops": "function",
                    "refittable": False,
                    "file": f"{folder}/{spec.component}.plan",
                }
            )
            for spec in components
        ]
    return tuple(found)


def build_plans(
    plans: Sequence[PlanSpec],
    shapes: Mapping[Part | Component, Sequence[PlanProfile]],
    writer: BundleWriter,
    stage: Stage,
    verify: Callable[[Sequence[PlanSpec]], None],
) -> tuple[tuple[PlanSpec, ...], EngineError | None]:
    """Build the plans into the bundle, and return those that are whole, and what failed.

    Where a plan fails, its flavour has none, and the export goes on: the graphs took long to write and run without
    plans. Unless a bundle is there already: one with plans is not replaced by one without. `verify` is called with a
    flavour's plans of the step when all are built; what it raises is a failure like another.

    Args:
        plans: to build.
        shapes: the profiles of every graph.
        writer: of the bundle, where the graphs are.
        stage: entered for every plan.
        verify: see above.
    """
    built: list[PlanSpec] = []
    failure: EngineError | None = None
    failed: set[Flavour] = set()
    for plan in plans:
        if plan.flavour in failed:
            continue
        files, timings = (writer.path / plan.part.onnx, writer.path / plan.file), timing_cache_path(writer.out, plan)
        try:
            built.append(build_one(plan, *files, shapes[plan.part], timings, stage))
            of_step = [each for each in built if each.flavour == plan.flavour and isinstance(each.part, Part)]
            if isinstance(plan.part, Part) and len(of_step) == len(Part):
                verify(of_step)
        except EngineError as error:
            if writer.out.exists():
                raise
            failure = failure or error
            failed.add(plan.flavour)
            shutil.rmtree(files[1].parent, ignore_errors=True)
            built = [each for each in built if each.flavour != plan.flavour]
    return tuple(built), failure
