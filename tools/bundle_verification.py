"""Whether a bundle is what was exported: every check of loading, on every file, each a finding."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from cat_pruning.bundle.bundle import Bundle, unlisted_files
from cat_pruning.bundle.plan_sets import PlanSet, plan_sets
from cat_pruning.bundle.schedules import read_schedules
from cat_pruning.errors import BundleError
from cat_pruning.step_io import Part
from cat_pruning.tools.findings import Finding, isolated

_NAMED = 3  # how many files a finding names


def verify_bundle(bundle: Bundle) -> tuple[Finding, ...]:
    """Check a bundle whose manifest holds and whose files have their sizes: read and hash all of them.

    Whatever does not hold is a finding with the status "problem"; files that the manifest does not list are one with
    "warning", because nothing loads them, unless they are among the pipeline's.
    """
    manifest = bundle.manifest
    folder = manifest.pipeline.path if manifest.pipeline else None
    sets = plan_sets(manifest.plans)
    apart = {*manifest.schedules, *(plan.file for plan in manifest.plans)}
    below = [name for name in manifest.files if folder and name.startswith(f"{folder}/")]
    graphs = [name for name in manifest.files if ".onnx" in name and name not in (*below, *apart)]
    others = [name for name in manifest.files if name not in (*below, *graphs, *apart)]
    findings = [isolated("graphs", _check_graphs, bundle, graphs)]
    if folder is not None:
        findings.append(isolated("pipeline", _check_pipeline, bundle, folder, below))
    if others:
        findings.append(isolated("files", _check_files, bundle, others))
    findings.append(isolated("schedules", _check_schedules, bundle))
    findings += [isolated(f"plans {each.name}", _check_plans, bundle, each) for each in sets]
    if unlisted := unlisted_files(bundle):
        text = f"{_named(unlisted)} not listed by the manifest, and loaded by nothing"
        findings.append(Finding("others", "warning", text, "move that away, if you do not know it"))
    return tuple(findings)


def _check_graphs(bundle: Bundle, names: list[str]) -> Finding:
    if faulty := _faulty(bundle, "graphs", names):
        return faulty
    for graph in bundle.manifest.every_graph():
        bundle.verify_graph(graph.file)
    return Finding("graphs", "ok", "they and their weights as they were exported")


def _check_pipeline(bundle: Bundle, folder: str, names: list[str]) -> Finding:
    if faulty := _faulty(bundle, "pipeline", names):
        return faulty
    bundle.verified_tree(folder)
    return Finding("pipeline", "ok", f"all {len(names)} files as they were exported, and nothing added")


def _check_schedules(bundle: Bundle) -> Finding:
    return Finding("schedules", "ok", ", ".join(read_schedules(bundle)) or "none")


def _check_files(bundle: Bundle, names: list[str]) -> Finding:
    return _faulty(bundle, "files", names) or Finding("files", "ok", f"{', '.join(names)} as exported")


def _check_plans(bundle: Bundle, plans: PlanSet) -> Finding:
    topic = f"plans {plans.name}"
    if faulty := _faulty(bundle, topic, [plan.file for plan in plans.plans]):
        return faulty
    there = {plan.part for plan in plans.plans}
    wanted = (*Part, *(spec.component for spec in bundle.manifest.components))
    if missing := [part.onnx for part in wanted if part not in there]:
        remedy = shlex.join(["cat-bundle", "prune", str(bundle.path), "--plans", plans.name])
        return Finding(topic, "problem", f"no plan of {', '.join(missing)}", remedy)
    return Finding(topic, "ok", plans.title)


def _faulty(bundle: Bundle, topic: str, names: Iterable[str]) -> Finding | None:
    """What is wrong with some of these files."""
    errors: dict[str, BundleError] = {}
    for name in names:
        try:
            bundle.verified(name)
        except BundleError as error:
            errors[name] = error
    if not errors:
        return None
    first = next(iter(errors.values()))
    problem = first.problem if len(errors) == 1 else f"{_named([*errors])} are not what was exported"
    return Finding(topic, "problem", problem, first.remedy)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
