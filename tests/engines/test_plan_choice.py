from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.manifest import Manifest
from cat_pruning.bundle.schema import Geometry, GraphSpec, PlanSpec, ProfileSpec, Source
from cat_pruning.dtype import DType
from cat_pruning.engines.plan_choice import plan_fit, plans_for, runs_on
from cat_pruning.errors import EngineError
from cat_pruning.names import Flavour
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part

RTX_ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")


def plans(
    flavour: Flavour, version: str, *architectures: str, parts: Sequence[Part] = tuple(Part)
) -> tuple[PlanSpec, ...]:
    folder = f"plans/{flavour}-{version}-{architectures[0]}"
    return tuple(
        PlanSpec(
            part=part,
            flavour=flavour,
            version=version,
            architectures=architectures,
            token_ops="function",
            file=f"{folder}/{part}.plan",
        )
        for part in parts
    )


RTX = plans("tensorrt_rtx", "1.7", *RTX_ARCHITECTURES)
SM90 = plans("tensorrt", "11.4", "sm90")
SM120 = plans("tensorrt", "11.4", "sm120")
OLD = plans("tensorrt", "10.15", "sm90")


def bundle(*built: PlanSpec) -> Bundle:
    return Bundle(
        path=Path("/bundles/sd3"),
        manifest=Manifest(
            family="sd3",
            source=Source(kind="hub", location="some/sd3"),
            transformer_class="SD3Transformer2DModel",
            transformer_config={},
            dtype=DType.BF16,
            guidance=True,
            settings=PruneSettings(),
            geometry=Geometry(
                pixels_per_latent=8, patch_size=2, latent_channels=16, max_latent_size=None, text_length=13
            ),
            graphs=tuple(GraphSpec(part=part, file=part.onnx, inputs=(), outputs=()) for part in Part),
            profiles=(
                ProfileSpec(
                    name="256x256", height=256, width=256, prompts=1, batch=2, latent_height=32, latent_width=32,
                    num_tokens=256, num_kept=76, text_length=13,
                ),
            ),
            plans=built,
            versions={},
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flavour", "version", "architecture", "expected"),
    [
        ("tensorrt", "11.4", "sm90", SM90),
        ("tensorrt", "11.4", "sm120", SM120),
        ("tensorrt", "10.15", "sm90", OLD),
        ("tensorrt_rtx", "1.7", "sm86", RTX),
        ("tensorrt_rtx", "1.7", "sm121", RTX),
    ],
)
def test_the_plans_of_this_machine(
    flavour: Flavour, version: str, architecture: str, expected: tuple[PlanSpec, ...]
) -> None:
    several = bundle(*SM120, *reversed(RTX), *OLD, *SM90)
    chosen = plans_for(several, flavour, version=version, architecture=architecture)
    assert chosen == {plan.part: plan for plan in expected}
    assert list(chosen) == list(Part)


@pytest.mark.parametrize(
    ("built", "flavour", "machine", "problem", "has", "target"),
    [
        ((), "tensorrt", ("11.4", "sm90"), "no plans for TensorRT;", "no plans at all", "tensorrt"),
        (RTX, "tensorrt", ("11.4", "sm90"), "no plans for TensorRT;",
         "TensorRT-RTX 1.7 for sm80, sm86, sm89, sm120", "tensorrt"),
        (SM90, "tensorrt_rtx", ("1.7", "sm90"), "no plans for TensorRT-RTX;", "TensorRT 11.4 for sm90",
         "tensorrt_rtx"),
        (OLD, "tensorrt", ("11.4", "sm90"), "no plans for TensorRT 11.4, and plans of one version do not load",
         "TensorRT 10.15 for sm90", "tensorrt --no-plugin"),
        ((*SM90, *OLD), "tensorrt", ("11.4", "sm120"), "no plans for sm120, this machine's GPU",
         "TensorRT 11.4 for sm90; TensorRT 10.15 for sm90", "tensorrt --no-plugin"),
        (RTX, "tensorrt_rtx", ("1.7", "sm90"), "no plans for sm90, this machine's GPU",
         "TensorRT-RTX 1.7 for sm80, sm86, sm89, sm120", "tensorrt"),
        (SM90[:2], "tensorrt", ("11.4", "sm90"), "no plan of step.onnx for TensorRT 11.4 on sm90",
         "TensorRT 11.4 for sm90", "tensorrt --no-plugin"),
    ],
)  # fmt: skip
def test_none_for_this_machine(
    built: tuple[PlanSpec, ...], flavour: Flavour, machine: tuple[str, str], problem: str, has: str, target: str
) -> None:
    version, architecture = machine
    with pytest.raises(EngineError) as caught:
        plans_for(bundle(*built), flavour, version=version, architecture=architecture)
    message = str(caught.value)
    assert message.startswith(f"/bundles/sd3 has {problem}")
    assert f"; it has {has}. This machine has " in message
    command = f"cat-export --add-plans /bundles/sd3 --target {target}"
    assert message.endswith(f"{version} and {architecture}; build the plans on it: {command}")


def test_no_gpu() -> None:
    with pytest.raises(EngineError, match=r"^TensorRT runs on an NVIDIA GPU, and this machine has none"):
        plans_for(bundle(*SM90), "tensorrt", version="11.4", architecture=None)


@pytest.mark.parametrize(
    ("architecture", "runs"),
    [
        ("sm75", False),  # Turing is built for only where it is asked for
        ("sm80", True),
        ("sm86", True),
        ("sm87", True),  # newer, of a generation that is listed
        ("sm89", True),
        ("sm90", False),  # Hopper: newer than sm89, and no GPU of TensorRT-RTX
        ("sm100", False),
        ("sm120", True),
        ("sm121", True),
        ("sm130", False),  # a generation that the builder did not know
    ],
)
def test_what_runs_a_plan_of_tensorrt_rtx(architecture: str, runs: bool) -> None:
    assert runs_on(RTX[0], architecture) == runs
    assert runs_on(plans("tensorrt", "11.4", "sm90")[0], architecture) == (architecture == "sm90")


def test_a_machine_of_which_little_is_known() -> None:
    """Without a GPU, or without the library: what can be said is said."""
    several = bundle(*RTX, *OLD)
    fit = plan_fit(several, "tensorrt_rtx", version="1.7", architecture=None)
    assert (fit.problem, fit.plans) == ("", {plan.part: plan for plan in RTX})
    assert plan_fit(several, "tensorrt", version=None, architecture="sm90").problem == ""
    assert plan_fit(several, "tensorrt", version=None, architecture="sm120").problem.startswith("no plans for sm120")
    assert plan_fit(several, "tensorrt", version="11.4", architecture=None).problem.startswith(
        "no plans for TensorRT 11"
    )
    fit = plan_fit(bundle(*SM90[:2]), "tensorrt", version=None, architecture=None)
    assert fit.problem == "no plan of step.onnx for TensorRT"
    assert fit.has == "TensorRT 11.4 for sm90"


def test_the_command_keeps_the_choice_of_no_plugin() -> None:
    with pytest.raises(EngineError, match=r"--add-plans /bundles/sd3 --target tensorrt --no-plugin$"):
        plans_for(bundle(*OLD), "tensorrt", version="11.4", architecture="sm90")


def test_of_several_sets_that_run_here_one_is_taken_whole() -> None:
    """Not a part of each: a set that was built for more GPUs later, or one that lacks a part."""
    later = plans("tensorrt_rtx", "1.7", "sm75", *RTX_ARCHITECTURES)
    chosen = plans_for(bundle(*RTX, *later), "tensorrt_rtx", version="1.7", architecture="sm89")
    assert chosen == {plan.part: plan for plan in later}
    chosen = plans_for(bundle(*RTX, *later[:2]), "tensorrt_rtx", version="1.7", architecture="sm89")
    assert chosen == {plan.part: plan for plan in RTX}
    chosen = plans_for(bundle(*RTX, *later), "tensorrt_rtx", version="1.7", architecture="sm80")
    assert len({plan.file.rpartition("/")[0] for plan in chosen.values()}) == 1
