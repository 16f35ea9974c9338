"""What `--verify` does in an export: before it, while the module is in memory, and to every plan that was built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cat_pruning.bundle.profiles import step_dims
from cat_pruning.bundle.schema import GraphSpec, PlanSpec, ProfileSpec
from cat_pruning.dtype import DType
from cat_pruning.errors import EngineError
from cat_pruning.exporter.calibration import Calibration
from cat_pruning.exporter.progress import Stage
from cat_pruning.exporter.verify import GRID, QUANTIZED_TOLERANCE, TEXT_LENGTH, Verify, verify_step_graph
from cat_pruning.exporter.verify_plans import (
    StepSample,
    can_verify,
    sample_layers,
    sample_outputs,
    verify_layers,
    verify_plans,
)
from cat_pruning.families.interception import StepModule
from cat_pruning.installation import require
from cat_pruning.names import TITLES, Quantization


@dataclass(frozen=True, slots=True)
class Samples:
    """Steps that torch has computed, to hold plans against; None where nothing is to be compared.

    quantization: of the plans' step, which torch computed without; their layers are not compared then.
    """

    outputs: StepSample | None = None
    layers: StepSample | None = None
    quantization: Quantization | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What is compared in one export.

    level: None for nothing. dtype: of the export. plans: those to be built that run on this machine.
    """

    level: Verify | None
    dtype: DType
    plans: tuple[PlanSpec, ...]

    @classmethod
    def of(cls, level: Verify | None, dtype: DType, plans: Sequence[PlanSpec]) -> Verification:
        """What can be compared here of an export; to be asked before it, because an export is long.

        Raises:
            EngineError: nothing that runs here computes in `dtype`.
            InstallationError: Polygraphy is needed and not installed.
        """
        runnable = tuple(plan for plan in plans if can_verify(plan)) if level else ()
        if level and dtype is DType.BF16 and not runnable:
            raise EngineError(
                "--verify: ONNX Runtime's CPU provider does not compute in bf16, and no plan is built that runs here",
                "verify with --dtype fp32",
            )
        if runnable or level is Verify.LAYERS:
            require("--verify of layers, and of plans that run here,", "debug")
        return cls(level=level, dtype=dtype, plans=runnable)

    def sample(
        self, step: StepModule, directory: Path, profile: ProfileSpec, stage: Stage, *, for_plans: bool = True
    ) -> Samples:
        """Hold the graphs in `directory` against the module, and compute what the plans will be held against.

        profile: whose pruned step is sampled for the plans.
        for_plans: false where the step will be quantized; then `check_quantized` samples it.

        Raises:
            EngineError: the graphs compute something else.
        """
        layers = outputs = None
        if self.level is Verify.LAYERS:
            with stage("Compare every layer under ONNX Runtime with torch"):
                num_kept = int(0.3 * GRID[0] * GRID[1])
                dims = step.family.dims(GRID, batch=1, text_length=TEXT_LENGTH, num_kept=num_kept)
                layers = sample_layers(step, dims, directory)
                if self.dtype is not DType.BF16:
                    verify_layers(directory, layers, self.dtype)
        if self.level and self.dtype is not DType.BF16:
            with stage("Compare ONNX Runtime with torch"):
                verify_step_graph(step, directory, self.dtype)
        if not for_plans:
            return Samples()
        if self.plans:
            with stage(f"Compute a step of {profile.name} with torch"):
                full, pruned = step_dims(profile, step.family.patch_size)
                outputs = sample_outputs(step, pruned if pruned.num_kept else full)
        return Samples(outputs, layers)

    def check_quantized(
        self,
        step: StepModule,
        directory: Path,
        quantization: Quantization,
        stage: Stage,
        calibration: Calibration | None = None,
    ) -> Samples:
        """Hold the graphs against the module again, now that the step is quantized, and sample for the plans again.

        calibration: whose step is computed; random inputs are beyond its scales.

        Raises:
            EngineError: they are off by more than the tolerance of the quantization.
        """
        given = None if calibration is None else (calibration.dims, calibration.inputs)
        if self.level and self.dtype is not DType.BF16:
            with stage("Compare the quantized step with torch"):
                verify_step_graph(step, directory, self.dtype, QUANTIZED_TOLERANCE[quantization], given)
        if not self.plans or given is None:
            return Samples()
        with stage("Compute a step of the calibration with torch"):
            return Samples(sample_outputs(step, *given), quantization=quantization)

    def check_plans(
        self,
        plans: Sequence[PlanSpec],
        samples: Samples,
        directory: Path,
        graphs: Sequence[GraphSpec],
        stage: Stage,
    ) -> None:
        """Hold the plans of one flavour against what was sampled; nothing where they do not run here.

        Raises:
            EngineError: they compute something else, or do not run.
        """
        if not {plan.file for plan in plans} <= {plan.file for plan in self.plans}:
            return
        title = TITLES[plans[0].flavour]
        if samples.layers is not None:
            with stage(f"Compare every layer under {title} with torch"):
                verify_layers(directory, samples.layers, self.dtype, plans, graphs)
        if samples.outputs is not None:
            with stage(f"Compare the {title} plans with ONNX Runtime and torch"):
                verify_plans(plans, directory, graphs, samples.outputs, self.dtype, samples.quantization)
