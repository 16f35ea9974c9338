"""The exported graphs under ONNX Runtime as a step engine."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

from cat_pruning import step_io
from cat_pruning.engines.onnxruntime_errors import ORT_ERRORS
from cat_pruning.errors import EngineError
from cat_pruning.exporter.families.family import Family
from cat_pruning.runtime.step_engine import StepEngine, StepSession
from cat_pruning.runtime.timestep_states import TimestepStates
from cat_pruning.step_io import Part, StepDims

_ONNX_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.int32: onnx.TensorProto.INT32,
}


class OnnxRuntimeStepEngine(StepEngine):
    """ONNX Runtime sessions of the exported graphs on the CPU; their weights serve every thread.

    Args:
        directory: where `{part}.onnx` are, with their external data beside them.
        family, config: of the model in them.
        dtype: of their weights; fp32 or fp16.

    Raises:
        EngineError: ONNX Runtime cannot run a model of this dtype here, or cannot load a file.
    """

    name = "onnxruntime"
    device = torch.device("cpu")

    def __init__(self, directory: Path, family: Family, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        if dtype not in _ONNX_TYPES:
            raise EngineError(
                f"ONNX Runtime's CPU provider does not compute in {str(dtype).removeprefix('torch.')}; "
                "export with --dtype fp32, or use --engine torch"
            )
        self.family, self.config, self.dtype = family, config, dtype
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; the warnings are about the optimizer's own nodes
        # Between two steps the selection and the scheduler run in torch, on the same cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.graphs: dict[Part, Any] = {}
        for part in Part:
            path = directory / part.onnx
            try:
                self.graphs[part] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except ORT_ERRORS as error:
                raise EngineError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}") from error
        self.inputs = {part: [value.name for value in graph.get_inputs()] for part, graph in self.graphs.items()}

    def session(self) -> OnnxRuntimeSession:
        """See `StepEngine.session`."""
        return OnnxRuntimeSession(self)

    def run(self, part: Part, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one of the small graphs.

        Raises:
            EngineError: ONNX Runtime failed.
        """
        graph = self.graphs[part]
        try:
            results = graph.run(None, {name: inputs[name].detach().numpy() for name in self.inputs[part]})
        except ORT_ERRORS as error:
            raise EngineError(f"ONNX Runtime failed in {part.onnx}: {error}") from error
        names = [value.name for value in graph.get_outputs()]
        return {name: torch.from_numpy(result) for name, result in zip(names, results, strict=True)}


class OnnxRuntimeSession(StepSession):
    """Each cache is bound as input and as output, so that ONNX Runtime updates it in place.

    Safe because nothing in the graph but the scatter reads a cache's rows.
    """

    engine: OnnxRuntimeStepEngine

    def __init__(self, engine: OnnxRuntimeStepEngine) -> None:
        super().__init__(engine)
        self._caches: dict[str, Tensor] = {}
        self._image: dict[str, Tensor] = {}  # inputs of every step of the image
        self._timestep_states: TimestepStates | None = None
        self._binding: Any = None

    def _allocate(self, dims: StepDims) -> None:
        engine = self.engine
        specs = engine.family.caches(engine.config)
        self._binding = engine.graphs[Part.STEP].io_binding()
        self._caches = {}
        names = iter(step_io.cache_names(len(specs)))
        for spec in specs:
            for _ in range(2):
                name = next(names)
                cache = torch.zeros([int(dim) for dim in spec.shape(dims)], dtype=engine.dtype)
                self._caches[name] = cache  # keeps the memory that is bound
                self._bind_input(name, cache)
                self._bind_output(step_io.output_name(name), cache)

    def _begin(self, dims: StepDims, conditioning: dict[str, Tensor], timesteps: Sequence[float]) -> None:
        engine = self.engine
        known = {**conditioning, **engine.run(Part.PROMPT, conditioning)}
        # Names the tensors, so that the bound memory lives as long as the image.
        self._image = {name: known[name].contiguous() for name in engine.inputs[Part.STEP] if name in known}
        for name, tensor in self._image.items():
            self._bind_input(name, tensor)
        symbolic = engine.family.input_shapes(engine.config, step_io.SYMBOLIC)
        inputs = [name for name in engine.inputs[Part.TIMESTEP] if name != step_io.TIMESTEP]
        self._timestep_states = TimestepStates(
            functools.partial(engine.run, Part.TIMESTEP),
            {value.name: tuple(value.shape) for value in engine.graphs[Part.TIMESTEP].get_outputs()},
            {name: conditioning[name] for name in inputs},
            {name for name in inputs if step_io.SYMBOLIC.batch in symbolic[name]},
            int(dims.batch),
            timesteps,
        )

    def _run(self, latents: Tensor, timestep: float, keep_indices: Tensor, noise: Tensor) -> Tensor:
        assert self._timestep_states is not None
        # Names the tensors, so that the bound memory lives until the run is over.
        inputs = {step_io.KEEP_INDICES: keep_indices, step_io.NOISE: noise, step_io.LATENTS: latents}
        inputs = {name: tensor.detach().contiguous() for name, tensor in inputs.items()}
        inputs |= self._timestep_states.at(timestep)
        for name, tensor in inputs.items():
            self._bind_input(name, tensor)
        result = torch.empty_like(noise)
        self._bind_output(step_io.output_name(step_io.NOISE), result)
        try:
            self.engine.graphs[Part.STEP].run_with_iobinding(self._binding)
        except ORT_ERRORS as error:
            raise EngineError(f"ONNX Runtime failed in a step: {error}") from error
        return result

    def _bind_input(self, name: str, tensor: Tensor) -> None:
        kind = _ONNX_TYPES[tensor.dtype]
        self._binding.bind_input(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())

    def _bind_output(self, name: str, tensor: Tensor) -> None:
        kind = _ONNX_TYPES[tensor.dtype]
        self._binding.bind_output(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())
