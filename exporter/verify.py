"""Do the exported graphs compute what torch computes? ONNX Runtime against the intercepted module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from cat_pruning.dtype import DType
from cat_pruning.engines.onnxruntime_errors import ORT_ERRORS
from cat_pruning.errors import EngineError
from cat_pruning.exporter.step_graph import example_inputs, run_step
from cat_pruning.families.interception import StepModule
from cat_pruning.step_io import Part

Array = NDArray[np.generic]

# Of the largest value that torch computes. fp32 differs by summation order only; fp16 rounds at every layer.
_TOLERANCE = {DType.FP32: 1e-4, DType.FP16: 3e-2}


def verify_step_graph(step: StepModule, directory: Path, dtype: DType) -> float:
    """Run a full and a pruned step at shapes that the files were not exported at; return the largest relative error.

    The error of an output is its largest difference from torch's, relative to torch's largest value.

    Raises:
        EngineError: an output differs by more than the tolerance of the dtype, or ONNX Runtime cannot run a file.
    """
    sessions = []
    for part in Part:  # in the order in which they need each other
        try:
            sessions.append(onnxruntime.InferenceSession(directory / part.onnx, providers=["CPUExecutionProvider"]))
        except ORT_ERRORS as error:
            raise EngineError(f"--verify: ONNX Runtime cannot load {part.onnx}: {error}") from error
    worst = 0.0
    for batch, kept in ((1, 0.3), (3, 1.0)):
        grid = (7, 10)  # odd and even
        num_kept = int(kept * grid[0] * grid[1])
        dims = step.family.dims(grid, batch=batch, text_length=9, num_kept=num_kept)
        inputs = example_inputs(step, dims, seed=batch)
        try:
            results = run_graphs(sessions, {name: tensor.numpy() for name, tensor in inputs.items()})
        except ORT_ERRORS as error:
            raise EngineError(f"--verify: ONNX Runtime failed in a step: {error}") from error
        for name, expected in run_step(step, inputs).items():
            difference = (torch.from_numpy(results[name]).float() - expected.float()).abs().max()
            deviation = float(difference / expected.float().abs().max().clamp_min(1e-6))
            if not deviation <= _TOLERANCE[dtype]:
                raise EngineError(
                    f"--verify: {name} of a step with {dims.num_kept} of {dims.num_tokens} tokens is off torch's by "
                    f"{deviation:.1e} of its largest value; at most {_TOLERANCE[dtype]:.0e} is rounding in {dtype}"
                )
            worst = max(worst, deviation)
    return worst


def run_graphs(sessions: Sequence[Any], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run the graphs of a split step in turn, each on the inputs and the results so far; everything by name."""
    values = dict(inputs)
    for session in sessions:
        results = session.run(None, {value.name: values[value.name] for value in session.get_inputs()})
        values.update(zip((value.name for value in session.get_outputs()), results, strict=True))
    return values
