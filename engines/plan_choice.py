"""Which of a bundle's plans run on this machine: those of the installed version, for this GPU's architecture."""

from __future__ import annotations

from collections.abc import Sequence

from cat_pruning.engines.bundle import Bundle
from cat_pruning.engines.records import Flavour, PlanSpec
from cat_pruning.engines.tensorrt_library import TITLES
from cat_pruning.errors import EngineError
from cat_pruning.step_io import Part


def plans_for(bundle: Bundle, flavour: Flavour, *, version: str, architecture: str | None) -> dict[Part, PlanSpec]:
    """The plan of every part that `flavour` runs here.

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
    ours = [plan for plan in bundle.manifest.plans if plan.flavour == flavour]
    current = [plan for plan in ours if plan.version == version]
    runnable = {plan.part: plan for plan in current if runs_on(plan, architecture)}
    if all(part in runnable for part in Part):
        return {part: runnable[part] for part in Part}
    rebuild = flavour
    if not ours:
        problem = f"no plans for {title}"
    elif not current:
        problem = f"no plans for {title} {version}, and plans of one version do not load in another"
    elif not runnable:
        problem = f"no plans for {architecture}, this machine's GPU"
        rebuild = "tensorrt"  # TensorRT-RTX's are the same from every machine; it does not know this GPU
    else:
        missing = ", ".join(f"{part}.onnx" for part in Part if part not in runnable)
        problem = f"no plan of {missing} for {title} {version} on {architecture}"
    raise EngineError(
        f"{bundle.path} has {problem}; it has {_described(bundle.manifest.plans)}. This machine has {title} {version} "
        f"and {architecture}; build the plans on it: {bundle.export_command(rebuild)}"
    )


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
    kinds = dict.fromkeys((TITLES[plan.flavour], plan.version, plan.architectures) for plan in plans)
    return (
        "; ".join(f"{title} {version} for {', '.join(built)}" for title, version, built in kinds) or "no plans at all"
    )
