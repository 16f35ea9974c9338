"""The exported graphs under ONNX Runtime as a step engine, on the CPU or a CUDA device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from cat_pruning import step_io
from cat_pruning.engines.graph_weights import GraphWeights
from cat_pruning.engines.onnxruntime_graphs import (
    bind_tensor,
    check_dtype,
    load_graph,
    ort_value,
    run_bound,
    run_graph,
    run_options,
)
from cat_pruning.engines.side_stream import SideStream
from cat_pruning.engines.step_engine import StepEngine, StepSession, zeros
from cat_pruning.engines.timestep_states import TimestepStates
from cat_pruning.families.family import Family
from cat_pruning.step_io import Part, StepDims


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
        self._run_options = run_options(self.device)

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
        new = {name: ort_value(weights[name]) for name in weights}
        loaded = {
            part: self._load(part, {name: new[name] for name in new if part in parts[name]}) for part in concerned
        }
        self.graphs, self._changed = self.graphs | loaded, frozenset(new)

    def _load(self, part: Part, replaced: Mapping[str, Any]) -> Any:
        """An ONNX Runtime session of a graph, with OrtValues in the place of some initializers."""
        return load_graph(self._directory / part.onnx, self.device, self.stream, replaced)

    def run(
        self, part: Part, inputs: Mapping[str, Tensor], graphs: Mapping[Part, Any] | None = None
    ) -> dict[str, Tensor]:
        """Run one of the small graphs: the engine's own, or of these, which an image began with.

        Raises:
            EngineError: ONNX Runtime failed.
        """
        graph = (graphs or self.graphs)[part]
        return run_graph(graph, inputs, self.device, self.stream, self._run_options, part.onnx)

    def run_bound(self, graph: Any, binding: Any, what: str) -> None:
        """Run a graph on bound memory. Does not synchronise with a GPU.

        Raises:
            EngineError: ONNX Runtime failed in `what`.
        """
        run_bound(graph, binding, self.stream, self._run_options, what)

    def bind(self, bind: Any, name: str, tensor: Tensor) -> None:
        """Bind a contiguous tensor by its address, with `bind_input` or `bind_output` of a binding."""
        bind_tensor(bind, name, tensor)


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
