"""Which engines run here, and what `cat-export` can build here."""

from __future__ import annotations

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.engines.plan_choice import plan_fit, runs_on
from cat_pruning.installation import require
from cat_pruning.names import TITLES, Flavour
from cat_pruning.tools.findings import Finding, Status, isolated
from cat_pruning.tools.machine_checks import onnxruntime_limit, started, where


def check_plans_engine(flavour: Flavour, bundle: Bundle | None, graphics: Finding) -> Finding:
    """`--engine tensorrt` or `tensorrt_rtx`: with the bundle's plans, or with those that could be built here."""
    from cat_pruning.engines.builder.build import plan_specs
    from cat_pruning.engines.gpu import gpu_architecture
    from cat_pruning.engines.graph_family import family_of_bundle

    if (architecture := gpu_architecture()) is None:
        return Finding(flavour, "problem", "needs an NVIDIA GPU", graphics.remedy)
    version = started(flavour)
    if bundle is None:
        if not all(runs_on(spec, architecture) for spec in plan_specs(flavour)):
            problem = f"{TITLES[flavour]} builds no plans for {architecture}, this machine's GPU"
            return Finding(flavour, "problem", problem, "pip install 'cat-pruning[tensorrt]' and take TensorRT")
        return Finding(flavour, "ok", f"on the GPU, from plans of version {version} for {architecture}")
    family_of_bundle(bundle)
    fit = plan_fit(bundle, flavour, version=version, architecture=architecture)
    if fit.problem:
        return Finding(flavour, "problem", f"the bundle has {fit.problem}", bundle.add_plans_command(fit.rebuild))
    for spec in fit.plans.values():
        bundle.verified(spec.file)
    return Finding(flavour, "ok", "on the GPU")


def check_onnxruntime_engine(bundle: Bundle | None) -> Finding:
    """`--engine onnxruntime`."""
    from cat_pruning.engines.graph_family import family_of_bundle
    from cat_pruning.engines.onnxruntime_graphs import check_dtype
    from cat_pruning.runtime.engine_choice import onnxruntime_device

    device = onnxruntime_device()
    if bundle is not None:
        check_dtype(bundle.manifest.dtype.torch, device)
        family_of_bundle(bundle)
        for graph in bundle.manifest.every_graph():
            bundle.verify_graph(graph.file)
    limit, remedy = onnxruntime_limit()
    if limit:
        status: Status = "problem" if device.type == "cuda" else "warning"  # its tensors would be on the GPU
        return Finding("onnxruntime", status, limit, remedy)
    return Finding("onnxruntime", "ok", where(device))


def check_torch_engine(bundle: Bundle | None) -> Finding:
    """`--engine torch`, which needs the checkpoint that was exported."""
    import torch

    from cat_pruning.checkpoints.checkpoint import check_transformer
    from cat_pruning.engines import torch_engine as _  # noqa: F401  # with all that it imports
    from cat_pruning.engines.graph_family import family_of_bundle

    place = where(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if bundle is None:
        return Finding("torch", "ok", place)
    source = bundle.manifest.source
    family_of_bundle(bundle)
    check_transformer(source)
    return Finding("torch", "ok", f"{place}, from the checkpoint {source.location}")


def check_auto(bundle: Bundle | None, running: list[str]) -> tuple[Finding, str | None]:
    """`--engine auto`, and the engine to take."""
    runs = running[0] if running else None
    if bundle is None:
        planned = " or ".join(engine for engine in running if engine in TITLES)
        first = f"{planned} where a bundle has plans for it, else " if planned else ""
        return Finding("auto", "ok" if running else "problem", f"takes {first}onnxruntime"), runs

    chosen: list[str] = []

    def check() -> Finding:
        from cat_pruning.runtime.engine_choice import best_engine

        choice = best_engine(bundle)
        if choice in running:
            chosen.append(choice)
            return Finding("auto", "ok", f"takes {choice}")
        remedy = f"take --engine {runs}" if runs else ""
        return Finding("auto", "problem", f"takes {choice}, which does not run here", remedy)

    finding = isolated("auto", check)
    return finding, chosen[0] if chosen else runs


def check_onnx_target() -> Finding:
    """`--target onnx`."""
    require("cat-export", "export")
    from cat_pruning.exporter import export as _  # noqa: F401  # with all that it imports

    return Finding("onnx", "ok", "graphs for ONNX Runtime, and for plans")


def check_plans_target(flavour: Flavour, graphics: Finding, plugin: Finding) -> Finding:
    """`--target tensorrt` or `tensorrt_rtx`."""
    from cat_pruning.engines.builder.build import plan_specs
    from cat_pruning.engines.gpu import gpu_architecture

    if flavour == "tensorrt" and gpu_architecture() is None:
        return Finding(flavour, "problem", "needs the NVIDIA GPU that will run the plans", graphics.remedy)
    spec = plan_specs(flavour)[0]
    started(flavour)
    text = f"{TITLES[flavour]} {spec.version} plans for {', '.join(spec.architectures)}"
    if flavour == "tensorrt" and plugin.status != "ok":
        return Finding(flavour, "warning", f"{text}, with --no-plugin only: the plugin {plugin.text}", plugin.remedy)
    return Finding(flavour, "ok", text + (" and later" if flavour == "tensorrt_rtx" else ""))
