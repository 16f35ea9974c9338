"""What `cat-doctor` looks at of a bundle: its pipeline, and whether its plans fit this machine."""

from __future__ import annotations

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.schedules import read_schedules
from cat_pruning.engines.plan_choice import plan_fit
from cat_pruning.errors import CatError, EngineError
from cat_pruning.names import TITLES, Flavour
from cat_pruning.tools.findings import Finding
from cat_pruning.tools.machine_checks import started


def check_pipeline(bundle: Bundle) -> Finding:
    """Text encoders, VAE and scheduler, without which a bundle is only a transformer; they are loaded.

    Those of the hub are looked at in the local cache only.
    """
    from cat_pruning.runtime.pipeline import import_pipeline, pipeline_directory, pipeline_parts

    spec = bundle.manifest.pipeline
    on_hub = spec is not None and spec.kind == "hub"
    try:
        directory = pipeline_directory(bundle, download=False)
        import_pipeline(directory)
        pipeline_parts(bundle, directory)
    except CatError as error:
        if spec is None or not on_hub:
            raise
        return Finding(
            "pipeline",
            "warning",
            f"{spec.hub_id} on the hub, not looked at: it is not whole in the local cache ({error.problem})",
            "the first use downloads what is missing; look again after that",
        )
    if spec is not None and on_hub:
        return Finding("pipeline", "ok", f"{spec.hub_id} of the hub, from the local cache")
    files = [path for path in directory.rglob("*") if path.is_file()]
    return Finding("pipeline", "ok", f"all {len(files)} files as they were exported")


def check_schedules(bundle: Bundle) -> Finding:
    """The schedules that `cat-tune` put there, and the script that feeds the graphs: read only when they are used."""
    schedules = read_schedules(bundle)
    for name in bundle.manifest.files:
        if "/" not in name and name.endswith(".py"):
            bundle.verified(name)
    return Finding("schedules", "ok", ", ".join(schedules) or "none; cat-tune makes them")


def check_plans(flavour: Flavour, bundle: Bundle) -> Finding:
    """Whether the bundle's plans are of the installed version and for this GPU, as far as there are both."""
    from cat_pruning.engines.gpu import gpu_architecture

    topic, architecture = f"plans {flavour}", gpu_architecture()
    try:
        version, missing = started(flavour), None
    except EngineError as error:
        version, missing = None, error
    fit = plan_fit(bundle, flavour, version=version, architecture=architecture)
    if fit.problem:
        where = "on the machine with the GPU: " if fit.rebuild == "tensorrt" and architecture is None else ""
        has = f"; the bundle has {fit.has}" if any(plan.flavour == flavour for plan in bundle.manifest.plans) else ""
        return Finding(topic, "warning", fit.problem + has, where + bundle.add_plans_command(fit.rebuild))
    for spec in fit.plans.values():
        bundle.verified(spec.file)
    spec = next(iter(fit.plans.values()))
    plans = f"of version {spec.version} for {', '.join(spec.architectures)}"
    if missing is not None:
        return Finding(topic, "warning", f"{plans}; {TITLES[flavour]} does not run here", missing.remedy)
    if architecture is None:
        return Finding(topic, "warning", f"{plans}: the installed version, but there is no GPU to run them")
    return Finding(topic, "ok", f"{plans}: the installed version and this GPU, {architecture}")
