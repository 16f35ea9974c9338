"""The plans of a bundle under TensorRT or TensorRT-RTX as a step engine.

One engine per graph, one context per profile, and so one set of weights for full and pruned steps, every resolution
and every thread. All contexts of a session share their scratch memory, because they never run at once.

Where the plugin scatters, it writes into its input: a cache's output is bound to the address of the input. TensorRT
does not report a plugin's aliases; should it copy the input first, the result is the same. So is the noise's in FLUX,
whose output is the scatter's own. In the other families reshapes and transposes lie between the two, no alias is
declared, and TensorRT may write the one before it has read the other: there the output is memory of its own, and is
copied, a few hundred kB. Where the function body scatters, outputs are memory of their own, and two sets of caches,
each with contexts of its own, are read and written in turn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from cat_pruning import step_io
from cat_pruning.bundle.schema import GraphSpec, TokenOps
from cat_pruning.engines.graph_weights import GraphWeights
from cat_pruning.engines.plan import Plan, PlanContext
from cat_pruning.engines.side_stream import SideStream
from cat_pruning.engines.step_engine import StepEngine, StepSession, TokenChoice, zeros
from cat_pruning.engines.timestep_states import TimestepStates
from cat_pruning.engines.turns import Turns
from cat_pruning.errors import EngineError, ShapeError
from cat_pruning.families.family import Family
from cat_pruning.names import TITLES, Flavour
from cat_pruning.step_io import KEEP_INDICES, NOISE, Part, Shape, StepDims


class TensorRTStepEngine(StepEngine):
    """The deserialised plans of a bundle; their weights serve every thread.

    Args:
        flavour: of the plans.
        plans: one of every part.
        token_ops: what scatters in the step's plan, as the build found out.
        graphs: what the plans were built from.
        family, dtype: of the model in them.
        device: where the plans were loaded.
        rebuild: the command that builds plans for other shapes; for messages.
        cuda_graphs: capture every kind of step, selection included, and replay it.
        weights: those of the graphs, asked for when an adapter is loaded; None where the plans are not refittable.

    Raises:
        EngineError: a plan is none of its graph's.
    """

    def __init__(
        self,
        flavour: Flavour,
        plans: Mapping[Part, Plan],
        token_ops: TokenOps,
        graphs: Sequence[GraphSpec],
        *,
        family: Family,
        dtype: torch.dtype,
        device: torch.device,
        rebuild: str,
        cuda_graphs: bool = True,
        weights: Callable[[], GraphWeights] | None = None,
    ) -> None:
        self.name, self.flavour = flavour, flavour
        self.plans, self.graphs = plans, {graph.part: graph for graph in graphs}
        self.family, self.dtype, self.device = family, dtype, device
        self.rebuild, self.cuda_graphs = rebuild, cuda_graphs
        for part, graph in self.graphs.items():
            expected = ({tensor.name for tensor in graph.inputs}, {tensor.name for tensor in graph.outputs})
            if (set(plans[part].inputs), set(plans[part].outputs)) != expected:
                raise EngineError(f"the plan of {graph.file} has other inputs or outputs than the graph", rebuild)
        self.residual_inputs = tuple(filter(step_io.is_residual, plans[Part.STEP].inputs))
        self.takes_residuals = bool(self.residual_inputs)
        self.in_place = token_ops == "plugin"
        self._read_weights = functools.cache(weights) if weights else None
        self._changed: frozenset[str] = frozenset()  # initializers that are not, or may not be, the export's
        self.turns = Turns()
        self.times_refitted = 0
        self.is_half_refitted = False

    @override
    def session(self) -> TensorRTSession:
        return TensorRTSession(self)

    @override
    def base_weights(self) -> GraphWeights:
        if self._read_weights is None:
            raise EngineError(
                f"the plans of {TITLES[self.flavour]} were not built to take adapters",
                f"build some that do ({self.rebuild} --refittable), or with the adapter in them (--lora)",
            )
        return self._read_weights()

    @override
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Refits the plans that it concerns, between two steps of other threads.

        Holds the changed weights of one graph in the host's memory. If it fails half done, nothing runs until a call
        succeeds.
        """
        base = self.base_weights()
        concerned = self._changed | set(weights)
        with self.turns.alone():
            self.times_refitted += 1
            self._changed, self.is_half_refitted = frozenset(concerned), True
            for part, plan in self.plans.items():
                if names := [name for name in sorted(concerned) if part in base.parts[name]]:
                    new = {name: weights[name] if name in weights else base.read(name) for name in names}
                    plan.refit(new, base.read)
            self._changed, self.is_half_refitted = frozenset(weights), False


class TensorRTSession(StepSession):
    """Caches in place where the plugin scatters; else two sets of them, read and written in turn."""

    engine: TensorRTStepEngine

    def __init__(self, engine: TensorRTStepEngine) -> None:
        super().__init__(engine)
        self.num_cache_sets = 1 if engine.in_place else 2
        self._stream = SideStream(engine.device)
        self._scratch: Tensor | None = None
        self._contexts: dict[tuple[Part, int, int], PlanContext] = {}  # by part, profile and cache set that is read
        self._caches: list[dict[str, Tensor]] = []
        self._states: dict[str, Tensor] = {}  # of the prompt and of the timestep of the step
        self._result = torch.empty(0)
        self._timestep_states: TimestepStates | None = None
        self._weights = 0  # how often the engine was refitted when the image in progress began

    @override
    def begin(self, dims: StepDims, conditioning: Mapping[str, Tensor], timesteps: Sequence[float] = ()) -> None:
        """Waits until a refit is done."""
        with self.engine.turns.together():
            super().begin(dims, conditioning, timesteps)

    @override
    def step(
        self,
        latents: Tensor,
        timestep: float,
        tokens: Tensor | TokenChoice,
        residuals: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Waits until a refit is done.

        Raises:
            EngineError: also where the engine was refitted since the image was begun.
        """
        with self.engine.turns.together():
            if self._dims is not None and self._weights != self.engine.times_refitted:
                self.reset()
                raise EngineError("adapters were changed while this image was in progress", "generate it again")
            return super().step(latents, timestep, tokens, residuals)

    def _check(self, dims: StepDims) -> None:
        if self.engine.is_half_refitted:
            raise EngineError(
                "a refit of the engine's weights failed half done", "unload the adapters, or load it anew"
            )
        if self._weights != self.engine.times_refitted:
            self._graphs.clear()  # TensorRT keeps contexts valid; of launches captured from them it promises nothing
            self._weights = self.engine.times_refitted
        graph = self.engine.graphs[Part.STEP]
        for num_kept in (dims.num_tokens, dims.num_kept or dims.num_tokens):
            self._profile(Part.STEP, graph.input_shapes(dataclasses.replace(dims, num_kept=num_kept)))

    def _allocate(self, dims: StepDims) -> None:
        engine = self.engine
        full = dataclasses.replace(dims, num_kept=dims.num_tokens)
        if self._scratch is None:
            needed = max(256, *(plan.scratch_bytes for plan in engine.plans.values()))  # a null pointer is none
            self._scratch = torch.empty(needed, dtype=torch.uint8, device=engine.device)
        specs = [spec for spec in engine.family.caches() for _ in range(2)]
        names = step_io.cache_names(len(specs) // 2)
        self._caches = [
            {
                name: zeros(spec.shape(dims), engine.dtype, engine.device)
                for name, spec in zip(names, specs, strict=True)
            }
            for _ in range(self.num_cache_sets)
        ]
        self._states = {
            tensor.name: zeros(tensor.shape_at(full), engine.plans[part].outputs[tensor.name], engine.device)
            for part in (Part.PROMPT, Part.TIMESTEP)
            for tensor in engine.graphs[part].outputs
        }
        in_place = engine.in_place and engine.family.noise_is_tokens
        self._result = self._noise if in_place else torch.empty_like(self._noise)

    def _free(self) -> None:
        super()._free()
        self._caches, self._states, self._result = [], {}, torch.empty(0)
        self._timestep_states = None

    def _begin(self, dims: StepDims, timesteps: Sequence[float]) -> None:
        engine = self.engine
        self._run_part(Part.PROMPT, {**self._inputs, **self._states})
        graph = engine.graphs[Part.TIMESTEP]
        reads, writes = ({tensor.name: tensor.shape for tensor in tensors} for tensors in (graph.inputs, graph.outputs))
        self._timestep_states = TimestepStates(self._run_timesteps, reads, writes, self._inputs, timesteps)

    def _load(self, timestep: float) -> None:
        assert self._timestep_states is not None
        for name, state in self._timestep_states.at(timestep).items():
            self._states[name].copy_(state)

    def _run(self, keep_indices: Tensor) -> None:
        old = self._caches[self._steps % self.num_cache_sets]
        new = self._caches[(self._steps + 1) % self.num_cache_sets]
        outputs = {step_io.output_name(name): cache for name, cache in new.items()}
        tensors = {**self._inputs, **self._states, **old, **outputs, NOISE: self._noise, KEEP_INDICES: keep_indices}
        self._run_part(Part.STEP, {**tensors, step_io.output_name(NOISE): self._result})
        if self._result is not self._noise:
            self._noise.copy_(self._result)

    def _run_timesteps(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        engine, rows = self.engine, inputs[step_io.TIMESTEP].shape[0]
        results = {}
        for tensor in engine.graphs[Part.TIMESTEP].outputs:
            shape = [rows if dim == step_io.SYMBOLIC.batch else dim for dim in tensor.shape]
            results[tensor.name] = zeros(shape, engine.plans[Part.TIMESTEP].outputs[tensor.name], engine.device)
        self._run_part(Part.TIMESTEP, {**inputs, **results})
        return results

    def _run_part(self, part: Part, tensors: Mapping[str, Tensor]) -> None:
        shapes = {name: tuple(tensors[name].shape) for name in self.engine.plans[part].inputs}
        self._context(part, shapes).run(tensors)

    def _context(self, part: Part, shapes: Mapping[str, Shape]) -> PlanContext:
        assert self._scratch is not None
        key = (part, self._profile(part, shapes), self._steps % self.num_cache_sets if part is Part.STEP else 0)
        if key not in self._contexts:
            self._contexts[key] = self.engine.plans[part].context(key[1], self._scratch, self._stream)
        return self._contexts[key]

    def _profile(self, part: Part, shapes: Mapping[str, Shape]) -> int:
        engine = self.engine
        try:
            return engine.plans[part].profile_for(shapes)
        except ShapeError as error:
            raise ShapeError(
                error.problem,
                "give the --resolution, --batch (rows, with --no-guidance), --text-length or --keep-ratio to this "
                f"command and run it: {engine.rebuild}",
            ) from error
