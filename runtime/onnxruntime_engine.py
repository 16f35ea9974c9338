"""`step.onnx` under ONNX Runtime as a step engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

from cat_pruning import step_io
from cat_pruning.errors import EngineError
from cat_pruning.exporter.families.family import Family
from cat_pruning.runtime.step_engine import StepEngine, StepSession
from cat_pruning.step_io import StepDims

_ONNX_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.int32: onnx.TensorProto.INT32,
}


class OnnxRuntimeStepEngine(StepEngine):
    """One ONNX Runtime session on the CPU; its weights serve every thread.

    Args:
        path: step.onnx, with its external data beside it.
        family, config: of the model in it.
        dtype: of its weights; fp32 or fp16.

    Raises:
        EngineError: ONNX Runtime cannot run a model of this dtype here, or cannot load the file.
    """

    name = "onnxruntime"
    device = torch.device("cpu")

    def __init__(self, path: Path, family: Family, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        if dtype not in _ONNX_TYPES:
            raise EngineError(
                f"ONNX Runtime's CPU provider does not compute in {str(dtype).removeprefix('torch.')}; "
                "export with --dtype fp32, or run the TensorRT engine on a GPU"
            )
        self.family, self.config, self.dtype = family, config, dtype
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; the warnings are about the optimizer's own nodes
        # Between two steps the selection and the scheduler run in torch, on the same cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session_handle = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except _ORT_ERRORS as error:
            raise EngineError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}") from error

    def session(self) -> OnnxRuntimeSession:
        """See `StepEngine.session`."""
        return OnnxRuntimeSession(self)


class OnnxRuntimeSession(StepSession):
    """Caches bound once, each as its input and as its output, so that ONNX Runtime updates it in place.

    Safe because nothing in the graph but the scatter reads a cache's rows.
    """

    engine: OnnxRuntimeStepEngine

    def __init__(self, engine: OnnxRuntimeStepEngine) -> None:
        super().__init__(engine)
        self._caches: dict[str, Tensor] = {}
        self._binding: Any = None

    def _allocate(self, dims: StepDims) -> None:
        engine = self.engine
        specs = engine.family.caches(engine.config)
        self._binding = engine.session_handle.io_binding()
        self._caches = {}
        names = iter(step_io.cache_names(len(specs)))
        for spec in specs:
            for _ in range(2):
                name = next(names)
                cache = torch.zeros([int(dim) for dim in spec.shape(dims)], dtype=engine.dtype)
                self._caches[name] = cache  # keeps the memory that is bound
                self._bind_input(name, cache)
                self._bind_output(step_io.output_name(name), cache)

    def _run(self, model_inputs: Mapping[str, Tensor], keep_indices: Tensor, noise: Tensor) -> Tensor:
        # Names the tensors, so that the bound memory lives until the run is over.
        inputs = {step_io.KEEP_INDICES: keep_indices, step_io.NOISE: noise, **model_inputs}
        inputs = {name: tensor.detach().contiguous() for name, tensor in inputs.items()}
        for name, tensor in inputs.items():
            self._bind_input(name, tensor)
        result = torch.empty_like(noise)
        self._bind_output(step_io.output_name(step_io.NOISE), result)
        try:
            self.engine.session_handle.run_with_iobinding(self._binding)
        except _ORT_ERRORS as error:
            raise EngineError(f"ONNX Runtime failed in a step: {error}") from error
        return result

    def _bind_input(self, name: str, tensor: Tensor) -> None:
        kind = _ONNX_TYPES[tensor.dtype]
        self._binding.bind_input(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())

    def _bind_output(self, name: str, tensor: Tensor) -> None:
        kind = _ONNX_TYPES[tensor.dtype]
        self._binding.bind_output(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())


def _ort_errors() -> tuple[type[Exception], ...]:
    # ONNX Runtime's exceptions share no base but Exception; those of its C API are listed in this module.
    state = onnxruntime.capi.onnxruntime_pybind11_state
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return (RuntimeError, *(getattr(state, name) for name in names if hasattr(state, name)))


_ORT_ERRORS = _ort_errors()
