"""Does step.onnx compute what torch computes? ONNX Runtime against the intercepted module."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch

from cat_pruning.dtype import DType
from cat_pruning.errors import EngineError
from cat_pruning.exporter.interception import StepModule
from cat_pruning.exporter.step_graph import example_inputs, run_step
from cat_pruning.step_io import StepDims

# Of the largest value that torch computes. fp32 differs by summation order only; fp16 rounds at every layer.
_TOLERANCE = {DType.FP32: 1e-4, DType.FP16: 3e-2}


def verify_step_graph(step: StepModule, step_onnx: Path, dtype: DType) -> float:
    """Run a full and a pruned step at shapes that the file was not exported at; return the largest relative error.

    The error of an output is its largest difference from torch's, relative to torch's largest value.

    Raises:
        EngineError: an output differs by more than the tolerance of the dtype, or ONNX Runtime cannot run the file.
    """
    patch = step.transformer.config["patch_size"]
    try:
        session = onnxruntime.InferenceSession(step_onnx, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineError(f"--verify: ONNX Runtime cannot load {step_onnx.name}: {error}") from error
    worst = 0.0
    for batch, kept in ((1, 0.3), (3, 1.0)):
        height, width, text_length = 7 * patch, 10 * patch, 9  # odd and even
        dims = StepDims.of(
            batch=batch,
            latent_height=height,
            latent_width=width,
            patch_size=patch,
            text_length=text_length,
            num_kept=int(kept * 70),
        )
        inputs = example_inputs(step, dims, seed=batch)
        results = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for (name, expected), result in zip(run_step(step, inputs).items(), results, strict=True):
            difference = (torch.from_numpy(result).float() - expected.float()).abs().max()
            deviation = float(difference / expected.float().abs().max().clamp_min(1e-6))
            if not deviation <= _TOLERANCE[dtype]:
                raise EngineError(
                    f"--verify: {name} of a step with {dims.num_kept} of {dims.num_tokens} tokens is off torch's by "
                    f"{deviation:.1e} of its largest value; at most {_TOLERANCE[dtype]:.0e} is rounding in {dtype}"
                )
            worst = max(worst, deviation)
    return worst
