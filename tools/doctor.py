"""What this machine can do for cat-pruning: a list of findings, and what to install or to run for the rest.

Every check stands alone and imports what it looks at by itself, so that a broken library is a finding and not the end
of the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from cat_pruning import __version__
from cat_pruning.bundle.bundle import Bundle
from cat_pruning.names import FLAVOURS, TITLES
from cat_pruning.tools.bundle_checks import check_pipeline, check_plans, check_schedules
from cat_pruning.tools.engine_checks import (
    check_auto,
    check_onnx_target,
    check_onnxruntime_engine,
    check_plans_engine,
    check_plans_target,
    check_torch_engine,
)
from cat_pruning.tools.findings import Finding, isolated
from cat_pruning.tools.machine_checks import (
    check_diffusers,
    check_driver,
    check_gpu,
    check_library,
    check_nvrtc,
    check_onnxruntime,
    check_plugin,
    check_torch,
    gpu_facts,
)

_NEEDED: Final = ("diffusers", "pipeline")  # whatever the engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings.

    Attributes:
        version: of cat-pruning.
        bundle_path: which bundle was asked about.
        can_generate: from the bundle; without one, whether any engine runs here.
        engine: the one to generate with, auto's choice where that runs; None where none does.
        gpu: see `describe_gpu`; empty where that failed.
        machine: the GPU, its driver, the libraries, and the plugin.
        bundle: its pipeline and its plans.
        engines: topics are the values of `--engine`.
        targets: topics are the values of `--target`.
    """

    version: str
    bundle_path: str | None
    can_generate: bool
    engine: str | None
    gpu: dict[str, Any]
    machine: tuple[Finding, ...]
    bundle: tuple[Finding, ...]
    engines: tuple[Finding, ...]
    targets: tuple[Finding, ...]


def examine(bundle: Bundle | None = None) -> Report:
    """Look at this machine, and at what of a bundle it can run. Whatever fails on the way is a finding."""
    graphics = isolated("gpu", check_gpu, remedy="pip install --force-reinstall torch")
    pipelines = isolated("diffusers", check_diffusers, remedy="pip install --force-reinstall diffusers transformers")
    nvrtc = isolated("nvrtc", check_nvrtc, missing="warning")
    plugin = isolated("plugin", check_plugin, nvrtc, remedy="update NVIDIA's driver")
    machine = (
        isolated("torch", check_torch, remedy="pip install --force-reinstall torch"),
        isolated("driver", check_driver),
        graphics,
        isolated("onnxruntime", check_onnxruntime, remedy="pip install --force-reinstall onnxruntime"),
        pipelines,
        *(isolated(flavour, check_library, flavour, missing="warning") for flavour in TITLES),
        nvrtc,
        plugin,
    )
    engines = (
        *(isolated(flavour, check_plans_engine, flavour, bundle, graphics) for flavour in TITLES),
        isolated("onnxruntime", check_onnxruntime_engine, bundle),
        isolated("torch", check_torch_engine, bundle),
    )
    parts: tuple[Finding, ...] = ()
    if bundle is not None:
        plans = (isolated(f"plans {flavour}", check_plans, flavour, bundle) for flavour in TITLES)
        own = (isolated("pipeline", check_pipeline, bundle), isolated("schedules", check_schedules, bundle))
        parts = (*own, *plans)
    running = [finding.topic for finding in engines if finding.status != "problem"]
    auto, choice = check_auto(bundle, running)
    complete = all(finding.status != "problem" for finding in (pipelines, *parts) if finding.topic in _NEEDED)
    return Report(
        version=__version__,
        bundle_path=str(bundle.path) if bundle else None,
        can_generate=bool(running) and complete,
        engine=choice,
        gpu=gpu_facts(),
        machine=machine,
        bundle=parts,
        engines=(*engines, auto),
        targets=(
            isolated("onnx", check_onnx_target),
            *(isolated(flavour, check_plans_target, flavour, graphics, plugin) for flavour in FLAVOURS),
        ),
    )
