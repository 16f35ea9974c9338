"""Engine plans from the graphs of a bundle.

A plan is built in a process of its own (`cat_pruning.engines.builder.plan_builder`): the builder's memory goes back to
the system, the weights are not held twice, and a crash inside the builder is an error here and not the end of the
process.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from onnx import load as load_onnx

from cat_pruning.bundle.profiles import PlanProfile
from cat_pruning.bundle.schema import PlanSpec, TokenOps
from cat_pruning.engines.builder.fused_attention import decomposable_path
from cat_pruning.engines.builder.plan_builder import PlanJob, PlanReport
from cat_pruning.engines.gpu import gpu_architecture, missing_gpu
from cat_pruning.engines.tensorrt_library import tensorrt_library
from cat_pruning.errors import EngineError
from cat_pruning.names import TITLES, Flavour
from cat_pruning.plugins import DOMAIN
from cat_pruning.step_io import Part

logger = logging.getLogger(__name__)

# The builder copies and frees weights of many sizes; with a fixed threshold glibc gives them back at once. Measured on
# SD3-medium: 0.7 GB less at the peak. Elsewhere than in glibc nobody reads it.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
# What a plan of TensorRT-RTX runs on unless it is built for something else: these "and later".
_RTX_ARCHITECTURES: tuple[str, ...] = ("sm80", "sm86", "sm89", "sm120")
_WITH_FP8: tuple[str, ...] = ("sm89", "sm120")  # of these; others have no products of fp8
_FIRST_WITH_FP8 = 89


def can_build(flavour: Flavour) -> bool:
    """Whether plans can be built here: by TensorRT-RTX anywhere, by TensorRT where there is a GPU."""
    if importlib.util.find_spec(flavour) is None or (flavour == "tensorrt" and gpu_architecture() is None):
        return False
    try:
        tensorrt_library(flavour)
    except EngineError:  # broken, or too old
        return False
    return True


def can_build_refittable(flavour: Flavour) -> bool:
    """Whether refittable plans can be built here.

    Not by TensorRT-RTX 1.7 without a GPU: its compiler asks the driver, whatever the graph, dtype or kind of refit.
    """
    return can_build(flavour) and gpu_architecture() is not None


def plan_specs(
    flavour: Flavour, token_ops: TokenOps = "function", *, refittable: bool = False, fp8: bool = False
) -> tuple[PlanSpec, ...]:
    """What is built here, one plan for every graph, and where in the bundle the plans go.

    Args:
        flavour: by which library.
        token_ops: who gathers and scatters tokens.
        refittable: weights can be replaced in the engine.
        fp8: the step computes in it, which GPUs do from Ada on.

    Raises:
        EngineError: the flavour is not installed or too old, or there is no GPU that it needs to build.
    """
    target = f"--target {flavour}"
    try:
        version = tensorrt_library(flavour).__version__
    except EngineError as error:
        raise EngineError(f"{target}: {error.problem}", error.remedy) from error
    if refittable and flavour == "tensorrt_rtx" and gpu_architecture() is None:
        raise EngineError(
            f"--refittable {target}: TensorRT-RTX builds no refittable plans without a GPU, and torch can use none "
            f"here ({missing_gpu()})",
            "build on a machine with one, or fuse the adapter with --lora; ONNX Runtime takes adapters from any bundle",
        )
    architectures = _WITH_FP8 if fp8 else _RTX_ARCHITECTURES
    built_for = "-".join(_WITH_FP8) if fp8 else f"{_RTX_ARCHITECTURES[0]}-and-later"
    if flavour == "tensorrt":
        if (architecture := gpu_architecture()) is None:
            raise EngineError(
                f"{target}: TensorRT measures its kernels on the GPU that will run them, and torch can use none here "
                f"({missing_gpu()})",
                "run it on that machine, or --target tensorrt_rtx, which builds anywhere",
            )
        if fp8 and int(architecture.removeprefix("sm")) < _FIRST_WITH_FP8:
            raise EngineError(
                f"{target}: this GPU is {architecture}, and products of fp8 take sm{_FIRST_WITH_FP8} or later",
                "export with --quantize int8, give another --target, or build on such a GPU",
            )
        architectures, built_for = (architecture,), architecture
    folder = f"plans/{flavour}-{version}-{built_for}"
    return tuple(
        PlanSpec(
            part=part,
            flavour=flavour,
            version=version,
            architectures=architectures,
            token_ops=token_ops,
            refittable=refittable,
            file=f"{folder}/{part}.plan",
        )
        for part in Part
    )


def build_plan(
    spec: PlanSpec, onnx: Path, plan: Path, profiles: Sequence[PlanProfile], timing_cache: Path | None = None
) -> PlanReport:
    """Build `plan` from the graph `onnx`, with one profile per entry of `profiles`, and log what it runs.

    Args:
        spec: by whom, and with which token operators.
        onnx: the graph, its weights beside it.
        plan: the file to write.
        profiles: see `plan_profiles`.
        timing_cache: where TensorRT's timings are kept; TensorRT-RTX has none.

    Raises:
        EngineError: the builder refused the graph or took another implementation, or its process died.
        OSError: the plan cannot be written.
    """
    plan.parent.mkdir(parents=True, exist_ok=True)
    job = PlanJob(
        flavour=spec.flavour,
        onnx=str(onnx),
        plan=str(plan),
        profiles=profiles,
        plugin_nodes=token_nodes(onnx) if spec.token_ops == "plugin" else {},
        timing_cache=str(timing_cache) if timing_cache and spec.flavour == "tensorrt" else None,
        architectures=spec.architectures,
        only_these=spec.flavour == "tensorrt_rtx" and spec.architectures != _RTX_ARCHITECTURES,
        refittable=spec.refittable,
    )
    result = subprocess.run(
        [sys.executable, "-m", "cat_pruning.engines.builder.plan_builder"],
        input=json.dumps(dataclasses.asdict(job)),
        capture_output=True,
        env=os.environ | _MALLOC,
        text=True,
        check=False,
    )
    for line in result.stderr.splitlines():
        logger.debug("%s: %s", onnx.name, line)
    decomposable_path(onnx).unlink(missing_ok=True)  # whatever the process died of
    report = json.loads(result.stdout) if result.stdout.startswith("{") else {}
    if result.returncode == 0:
        built = PlanReport(**{**report, "warnings": tuple(report.get("warnings", ()))})
        _log_built(onnx.name, job, built)
        return built
    if "errno" in report:
        raise OSError(report["errno"], report["problem"], str(plan))
    raise EngineError(
        f"{TITLES[spec.flavour]} cannot build {onnx.name}: {report.get('problem') or _last_words(result)}",
        report.get("remedy", ""),
    )


def token_nodes(onnx: Path) -> dict[str, int]:
    """How many nodes of each token operator a graph has."""
    graph = load_onnx(onnx, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node if node.domain == DOMAIN))


def with_report(spec: PlanSpec, report: PlanReport) -> PlanSpec:
    """The plan's record with what its build found out."""
    return spec.model_copy(
        update={
            "plugin_layers": report.engine_plugins,
            "attention": report.attention,
            "fused_attention": report.fused_attention,
            "scratch_bytes": report.scratch_bytes,
            "score_bytes": report.score_bytes,
        }
    )


def _log_built(name: str, job: PlanJob, built: PlanReport) -> None:
    for warning in built.warnings:
        logger.warning("%s: %s", name, warning)
    nodes = sum(job.plugin_nodes.values())
    if built.engine_plugins is not None:
        logger.info("%s: %d of the engine's %d layers are plugins", name, built.engine_plugins, built.engine_layers)
        if nodes and not built.engine_plugins:
            logger.warning("%s: the network had %d plugin layers, the engine shows none", name, nodes)
    if built.attention is not None:
        found = (
            f"{name}: attention was built as {built.attention}; kernels named so: {_known(built.fused_attention)}; "
            f"scratch memory {_known(built.scratch_bytes)} bytes, a whole score matrix {_known(built.score_bytes)}"
        )
        logger.log(logging.WARNING if _may_be_unfused(built) else logging.INFO, found)


def _may_be_unfused(built: PlanReport) -> bool:
    """Whether an engine that was held to fused attention looks as if it had none."""
    if built.attention != "fused" or built.fused_attention:
        return False
    if built.fused_attention == 0:
        return True
    return built.scratch_bytes is not None and built.scratch_bytes >= (built.score_bytes or math.inf)


def _known(number: int | None) -> str:
    return "not known" if number is None else f"{number:,}"


def _last_words(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    died = f"its process ended with {result.returncode}"
    if result.returncode == -9:
        died += " (killed: probably out of memory; it needs about twice the weights)"
    return f"{died}: {lines[-1]}" if lines else died
