"""Which of a bundle's plans run on this machine: those of the installed version, for this GPU's architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.plan_sets import plan_sets
from cat_pruning.bundle.schema import PlanSpec
from cat_pruning.components import Component
from cat_pruning.errors import EngineError
from cat_pruning.names import TITLES, Flavour
from cat_pruning.step_io import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFit:
    """How a bundle's plans of one flavour fit a machine.

    Attributes:
        plans: that of every graph where they fit, else none.
        problem: what the bundle does not have; empty where the plans fit.
        has: all plans of the bundle, in words.
        rebuild: the flavour whose plans would fit.
    """

    plans: dict[Part | Component, PlanSpec]
    problem: str
    has: str
    rebuild: Flavour


def plans_for(
    bundle: Bundle, flavour: Flavour, *, version: str, architecture: str | None
) -> dict[Part | Component, PlanSpec]:
    """The plan of every graph, of the step's parts and of the components, that `flavour` runs here.

    Args:
        bundle: with any plans or none.
        flavour: TensorRT or TensorRT-RTX.
        version: of the installed one, `tensorrt_library(flavour).__version__`: plans are of one version.
        architecture: of the GPU, by `gpu_architecture`; None where there is no GPU.

    Raises:
        EngineError: the bundle has none for this machine; which it has, and the command that builds these.
    """
    title = TITLES[flavour]
    if architecture is None:
        raise EngineError(f"{title} runs on an NVIDIA GPU, and this machine has none that it can use")
    fit = plan_fit(bundle, flavour, version=version, architecture=architecture)
    if not fit.problem:
        return fit.plans
    raise EngineError(
        f"{bundle.path} has {fit.problem}; it has {fit.has}. This machine has {title} {version} and {architecture}",
        f"build the plans on it: {bundle.add_plans_command(fit.rebuild)}",
    )


def plan_fit(bundle: Bundle, flavour: Flavour, *, version: str | None, architecture: str | None) -> PlanFit:
    """How the plans of `flavour` fit a machine. What is None of it, the version or the GPU, is not asked for."""
    title = TITLES[flavour]
    named = f"{title} {version}" if version else title
    ours = [plan for plan in bundle.manifest.plans if plan.flavour == flavour]
    current = [plan for plan in ours if version in (None, plan.version)]
    sets = plan_sets(plan for plan in current if architecture is None or runs_on(plan, architecture))
    # Of several that run here, as of GPUs that are one another's successors, the one that lacks no part and came last.
    runnable = max(({plan.part: plan for plan in each.plans} for each in reversed(sets)), key=len, default={})
    problem, rebuild = "", flavour
    wanted = (*Part, *(spec.component for spec in bundle.manifest.components))
    if not ours:
        problem = f"no plans for {title}"
    elif not current:
        problem = f"no plans for {named}, and plans of one version do not load in another"
    elif not runnable:
        problem = f"no plans for {architecture}, this machine's GPU"
        rebuild = "tensorrt"  # TensorRT-RTX's are the same from every machine; it does not know this GPU
    elif missing := ", ".join(part.onnx for part in wanted if part not in runnable):
        problem = f"no plan of {missing} for {named}" + (f" on {architecture}" if architecture else "")
    plans = {} if problem else {part: runnable[part] for part in wanted}
    return PlanFit(plans=plans, problem=problem, has=_described(bundle.manifest.plans), rebuild=rebuild)


def runs_on(plan: PlanSpec, architecture: str) -> bool:
    """Whether a GPU of `architecture` runs a plan.

    TensorRT's run on the one that they were built on. TensorRT-RTX's, compiled to the end on the GPU itself, run on
    those listed "and later". Later is read as in CUDA, where code for one architecture runs on the newer ones of its
    generation: sm121 runs what was built for sm120, as sm87 does for sm86. Not what is newer by number alone: Hopper
    (sm90) and Blackwell's data centre (sm100) lie between RTX generations, and TensorRT-RTX knows neither.
    """
    if plan.flavour == "tensorrt":
        return architecture in plan.architectures
    generation, model = _numbers(architecture)
    return any(generation == major and model >= minor for major, minor in map(_numbers, plan.architectures))


def _numbers(architecture: str) -> tuple[int, int]:
    return divmod(int(architecture.removeprefix("sm")), 10)


def _described(plans: Sequence[PlanSpec]) -> str:
    return "; ".join(dict.fromkeys(each.title for each in plan_sets(plans))) or "no plans at all"
