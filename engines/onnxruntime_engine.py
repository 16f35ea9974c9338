"""The exported graphs under ONNX Runtime as a step engine, on the CPU or a CUDA device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor
from typing_extensions import override

from cat_pruning import step_io
from cat_pruning.engines.graph_weights import GraphWeights
from cat_pruning.engines.onnxruntime_sessions import ORT_ERRORS, quiet_run_options, quiet_session
from cat_pruning.engines.side_stream import SideStream
from cat_pruning.engines.step_engine import StepEngine, StepSession, zeros
from cat_pruning.engines.timestep_states import TimestepStates
from cat_pruning.errors import EngineError
from cat_pruning.families.family import Family
from cat_pruning.step_io import Part, StepDims

_ONNX_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int32: onnx.TensorProto.INT32,
}
_TORCH_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int32)": torch.int32,
}


class OnnxRuntimeStepEngine(StepEngine):
    """ONNX Runtime sessions of the exported graphs; their weights serve every thread.

    Args:
        directory: where `{part}.onnx` are, with their external data beside them.
        family: of the model in them.
        dtype: of their weights; fp32 or fp16 on the CPU.
        device: the CPU, or a CUDA device where `onnxruntime-gpu` is installed. There, what the CUDA provider has no
            kernel for runs on the CPU, in the middle of a step.
        weights: those of the graphs, asked for when an adapter is loaded; by default read from the directory.

    Raises:
        EngineError: ONNX Runtime cannot run a model of this dtype here, has no provider for the device, or cannot load
            a file.
    """

    name = "onnxruntime"

    def __init__(
        self,
        directory: Path,
        family: Family,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        weights: Callable[[], GraphWeights] | None = None,
    ) -> None:
        self.family, self.dtype, self.device = family, dtype, torch.device(device)
        check_dtype(dtype, self.device)
        self.stream = SideStream(self.device)
        self._directory = directory
        self._read_weights = functools.cache(weights or functools.partial(GraphWeights, directory))
        self._changed: frozenset[str] = frozenset()  # initializers that are not the export's
        self.graphs: dict[Part, Any] = {part: self._load(part, {}) for part in Part}  # replaced whole, never in part
        self.inputs = {part: [value.name for value in graph.get_inputs()] for part, graph in self.graphs.items()}
        self.residual_inputs = tuple(filter(step_io.is_residual, self.inputs[Part.STEP]))
        self.takes_residuals = bool(self.residual_inputs)
        self._run_options = quiet_run_options()
        if self.device.type == "cuda":  # the stream keeps the order
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    @override
    def session(self) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(self)

    @override
    def base_weights(self) -> GraphWeights:
        return self._read_weights()

    @override
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Graphs that it concerns are loaded anew; an image in progress keeps its own.

        Until then, old and new ones are held.
        """
        parts = self.base_weights().parts
        concerned = set().union(*(parts[name] for name in self._changed | set(weights)))
        new = {name: _ort_value(weights[name]) for name in weights}
        loaded = {
            part: self._load(part, {name: new[name] for name in new if part in parts[name]}) for part in concerned
        }
        self.graphs, self._changed = self.graphs | loaded, frozenset(new)

    def _load(self, part: Part, replaced: Mapping[str, Any]) -> Any:
        """An ONNX Runtime session of a graph, with OrtValues in the place of some initializers."""
        options = onnxruntime.SessionOptions()
        # Between two steps the selection and the scheduler run in torch, on the same cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.device.type == "cpu":
            # Each of the three graphs would keep its largest activations of every shape; it is no faster with them.
            options.enable_cpu_mem_arena = False
        for name, value in replaced.items():
            options.add_initializer(name, value)
        path = self._directory / part.onnx
        try:
            # Without a fallback: if a provider cannot be loaded, the user is told.
            graph = quiet_session(path, self._providers(), options, enable_fallback=0)
        except ORT_ERRORS as error:
            raise EngineError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}") from error
        graph.replaced = replaced  # which it refers to and does not hold
        self._check_provider(graph)
        return graph

    def run(
        self, part: Part, inputs: Mapping[str, Tensor], graphs: Mapping[Part, Any] | None = None
    ) -> dict[str, Tensor]:
        """Run one of the small graphs: the engine's own, or of these, which an image began with.

        Raises:
            EngineError: ONNX Runtime failed.
        """
        graph = (graphs or self.graphs)[part]
        binding = graph.io_binding()
        sizes: dict[object, int] = {}
        given = {value.name: inputs[value.name].detach().contiguous() for value in graph.get_inputs()}
        for value in graph.get_inputs():
            self.bind(binding.bind_input, value.name, given[value.name])
            sizes |= dict(zip(value.shape, given[value.name].shape, strict=False))
        results = {
            value.name: torch.empty(
                [int(sizes.get(dim, dim)) for dim in value.shape], dtype=_TORCH_TYPES[value.type], device=self.device
            )
            for value in graph.get_outputs()
        }
        for name, result in results.items():
            self.bind(binding.bind_output, name, result)
        self.run_bound(graph, binding, part.onnx)
        return results

    def run_bound(self, graph: Any, binding: Any, what: str) -> None:
        """Run a graph on bound memory. Does not synchronise with a GPU.

        Raises:
            EngineError: ONNX Runtime failed in `what`.
        """
        try:
            with self.stream.in_turn():  # the stream that the provider was given
                graph.run_with_iobinding(binding, self._run_options)
        except ORT_ERRORS as error:
            raise EngineError(f"ONNX Runtime failed in {what}: {error}") from error

    def bind(self, bind: Any, name: str, tensor: Tensor) -> None:
        """Bind a contiguous tensor by its address, with `bind_input` or `bind_output` of a binding."""
        bind(
            name,
            tensor.device.type,
            tensor.device.index or 0,
            _ONNX_TYPES[tensor.dtype],
            tensor.shape,
            tensor.data_ptr(),
        )

    def _providers(self) -> list[Any]:
        if self.device.type == "cpu":
            return ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise EngineError(
                f"this ONNX Runtime {onnxruntime.__version__} has no CUDA provider",
                "pip install onnxruntime-gpu in its place, or load the engine on the CPU",
            )
        options = {
            "device_id": str(self.device.index or 0),
            "user_compute_stream": str(self.stream.handle),
            "use_tf32": "0",  # fp32 is what was asked for, and what the other engines compute
            "arena_extend_strategy": "kSameAsRequested",
        }
        return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]

    def _check_provider(self, graph: Any) -> None:
        if self.device.type == "cuda" and "CUDAExecutionProvider" not in graph.get_providers():
            raise EngineError(
                f"the CUDA provider of ONNX Runtime {onnxruntime.__version__} cannot be loaded",
                "pip install 'onnxruntime-gpu[cuda,cudnn]', or take the engine torch",
            )


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """That ONNX Runtime computes in `dtype` on `device`.

    Raises:
        EngineError: it does not.
    """
    if device.type == "cpu" and dtype is torch.bfloat16:
        raise EngineError(
            "ONNX Runtime's CPU provider does not compute in bfloat16",
            "export with --dtype fp32, or use --engine torch",
        )


def _ort_value(tensor: Tensor) -> Any:
    """On the CPU, over a tensor's own memory."""
    if tensor.dtype is torch.bfloat16:  # which numpy has not got
        bits = tensor.view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_TYPES[tensor.dtype])
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


class OnnxRuntimeSession(StepSession):
    """Each cache is bound as input and as output, so that ONNX Runtime updates it in place.

    Safe because nothing in the graph but the scatter reads a cache's rows.
    """

    engine: OnnxRuntimeStepEngine

    def __init__(self, engine: OnnxRuntimeStepEngine) -> None:
        super().__init__(engine)
        self._caches: dict[str, Tensor] = {}
        self._states: dict[str, Tensor] = {}  # of the prompt and of the timestep, kept as long as they are bound
        self._result = torch.empty(0)
        self._timestep_states: TimestepStates | None = None
        self._binding: Any = None
        self._sessions = engine.graphs  # of the image in progress

    @override
    def reset(self) -> None:
        """Lets go of graphs whose weights are not the engine's any more, and what is bound."""
        super().reset()
        if self._sessions is not self.engine.graphs:
            self._free()
            self._sessions = self.engine.graphs

    def _allocate(self, dims: StepDims) -> None:
        engine = self.engine
        specs = engine.family.caches()
        self._binding = self._sessions[Part.STEP].io_binding()
        names = iter(step_io.cache_names(len(specs)))
        for spec in specs:
            for _ in range(2):
                name = next(names)
                cache = zeros(spec.shape(dims), engine.dtype, engine.device)
                self._caches[name] = cache
                engine.bind(self._binding.bind_input, name, cache)
                engine.bind(self._binding.bind_output, step_io.output_name(name), cache)
        self._result = torch.empty_like(self._noise)
        engine.bind(self._binding.bind_output, step_io.output_name(step_io.NOISE), self._result)
        for name, tensor in {**self._inputs, step_io.NOISE: self._noise}.items():
            self._bind_if_read(name, tensor)

    def _free(self) -> None:
        super()._free()
        self._binding, self._caches, self._states, self._result = None, {}, {}, torch.empty(0)
        self._timestep_states = None

    def _begin(self, dims: StepDims, timesteps: Sequence[float]) -> None:
        engine = self.engine
        self._states = engine.run(Part.PROMPT, self._inputs, self._sessions)
        for name, tensor in self._states.items():
            self._bind_if_read(name, tensor)
        graph = self._sessions[Part.TIMESTEP]
        reads, writes = (
            {value.name: tuple(value.shape) for value in values} for values in (graph.get_inputs(), graph.get_outputs())
        )
        run = functools.partial(engine.run, Part.TIMESTEP, graphs=self._sessions)
        self._timestep_states = TimestepStates(run, reads, writes, self._inputs, timesteps)

    def _load(self, timestep: float) -> None:
        assert self._timestep_states is not None
        states = self._timestep_states.at(timestep)
        for name, tensor in states.items():
            self._bind_if_read(name, tensor)
        self._states |= states

    def _run(self, keep_indices: Tensor) -> None:
        self._bind_if_read(step_io.KEEP_INDICES, keep_indices)
        for name in self.engine.residual_inputs:
            self._bind_if_read(name, self._inputs[name])
        self.engine.run_bound(self._sessions[Part.STEP], self._binding, "a step")
        self._noise.copy_(self._result)

    def _bind_if_read(self, name: str, tensor: Tensor) -> None:
        if name in self.engine.inputs[Part.STEP]:
            self.engine.bind(self._binding.bind_input, name, tensor)
