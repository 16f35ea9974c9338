"""Do the exported graphs compute what torch computes? ONNX Runtime against the intercepted module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cat_pruning.dtype import DType
from cat_pruning.engines.onnxruntime_sessions import ORT_ERRORS, quiet_session, run_quietly
from cat_pruning.errors import EngineError
from cat_pruning.exporter.step_graph import example_inputs, run_step
from cat_pruning.families.interception import StepModule
from cat_pruning.names import Quantization
from cat_pruning.step_io import Part, StepDims

Array = NDArray[np.generic]

# Of the largest value that was expected. fp32 differs by summation order only. 16 bits round at every layer: sd3-mini
# is off its own fp32 by 3e-3 in fp16 and 2e-2 in bf16.
TOLERANCE: Final = {DType.FP32: 1e-4, DType.FP16: 3e-2, DType.BF16: 1e-1}
# Likewise. Tiny random transformers of every family are off by 3e-2 (int8), 2e-2 and 2e-1 (weights only) at most, all
# in their caches. Calibrated ones are compared on a step of the images that their scales are of: sd3-mini is off there
# by up to 1e-1 in int8, with a random adapter in it, and by 3e-1 in fp8, in single values.
QUANTIZED_TOLERANCE: Final = {
    Quantization.INT8: 1e-1,
    Quantization.INT8_CALIBRATED: 2e-1,
    Quantization.FP8: 5e-1,
    Quantization.WEIGHTS_INT8: 1e-1,
    Quantization.WEIGHTS_INT4: 5e-1,
}
GRID: Final = (7, 10)  # tokens of the steps that are compared before there are plans: odd and even
TEXT_LENGTH: Final = 9
LAYERS_REMEDY: Final = "--verify layers tells the first layer that differs"


class Verify(StrEnum):
    """What `cat-export --verify` compares: what the graphs return, or besides what every layer computes."""

    OUTPUTS = "outputs"
    LAYERS = "layers"


@dataclass(frozen=True, slots=True)
class Divergence:
    """A result that differs by more than rounding, and by how much of its largest expected value."""

    name: str
    error: float


def verify_step_graph(
    step: StepModule,
    directory: Path,
    dtype: DType,
    tolerance: float | None = None,
    given: tuple[StepDims, Mapping[str, Tensor]] | None = None,
) -> float:
    """Run a full and a pruned step at shapes that the files were not exported at; return the largest relative error.

    The error of an output is its largest difference from torch's, relative to torch's largest value.

    Args:
        step: the module.
        directory: of the graphs.
        dtype: of the export.
        tolerance: of the error; by default that of the dtype.
        given: a step to run instead of random ones: its dimensions, and inputs by name; the others are random.

    Raises:
        EngineError: an output differs by more than the tolerance, or ONNX Runtime cannot run a file.
    """
    sessions = []
    for part in Part:  # in the order in which they need each other
        try:
            sessions.append(quiet_session(directory / part.onnx))
        except ORT_ERRORS as error:
            raise EngineError(f"--verify: ONNX Runtime cannot load {part.onnx}: {error}") from error
    worst = 0.0
    for dims, values in (
        _random_steps(step) if given is None else [(given[0], example_inputs(step, given[0]) | dict(given[1]))]
    ):
        try:
            results = run_graphs(sessions, {name: tensor.numpy() for name, tensor in values.items()})
        except ORT_ERRORS as error:
            raise EngineError(f"--verify: ONNX Runtime failed in a step: {error}") from error
        tensors = {name: torch.from_numpy(value) for name, value in results.items()}
        largest, divergence = compare(tensors, run_step(step, values), dtype, tolerance)
        if divergence is not None:
            problem = (
                f"--verify: {divergence.name} of a step with {dims.num_kept} of {dims.num_tokens} tokens is off "
                f"torch's by {divergence.error:.1e} of its largest value; at most "
            )
            if tolerance is not None:
                problem += f"{tolerance:.0e} is expected of its quantization"
                raise EngineError(problem, "export it with more bits, or without quantization")
            raise EngineError(f"{problem}{TOLERANCE[dtype]:.0e} is rounding in {dtype}", LAYERS_REMEDY)
        worst = max(worst, largest)
    return worst


def _random_steps(step: StepModule) -> Iterator[tuple[StepDims, dict[str, Tensor]]]:
    for batch, kept in ((1, 0.3), (3, 1.0)):
        num_kept = int(kept * GRID[0] * GRID[1])
        dims = step.family.dims(GRID, batch=batch, text_length=TEXT_LENGTH, num_kept=num_kept)
        yield dims, example_inputs(step, dims, seed=batch)


def compare(
    results: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: DType, tolerance: float | None = None
) -> tuple[float, Divergence | None]:
    """The largest relative error, and the first result in the order of `expected` that is off by more than rounding.

    What is not in both is not compared. Reads the values: on a GPU that waits for it.
    """
    worst, first, most = 0.0, None, TOLERANCE[dtype] if tolerance is None else tolerance
    for name in expected:
        if name not in results:
            continue
        error = relative_error(results[name], expected[name])
        if first is None and not error <= most:  # NaN is not
            first = Divergence(name, error)
        worst = max(worst, error)
    return worst, first


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value; infinite where the shapes differ."""
    if result.shape != expected.shape:
        return float("inf")
    difference = (result.float() - expected.float()).abs().max()
    return float(difference / expected.float().abs().max().clamp_min(1e-6))


def run_graphs(sessions: Sequence[Any], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run the graphs of a split step in turn, each on the inputs and the results so far; everything by name."""
    values = dict(inputs)
    for session in sessions:
        results = run_quietly(session, {value.name: values[value.name] for value in session.get_inputs()})
        values.update(zip((value.name for value in session.get_outputs()), results, strict=True))
    return values
