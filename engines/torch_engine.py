"""The intercepted diffusers module as a step engine: the reference for parity."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing_extensions import override

from cat_pruning.engines.step_engine import StepEngine, StepSession, zeros
from cat_pruning.engines.torch_compiled import ModulationStates, compile_blocks, compiler_errors, compiles, fuse_gelu
from cat_pruning.errors import CheckpointError, SettingsError
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.families.module_hooks import LAYERWISE_CASTING, hooks_of
from cat_pruning.finite import has_values
from cat_pruning.step_io import TIMESTEP, StepDims


class TorchStepEngine(StepEngine):
    """Runs a diffusers transformer where its weights are. The given module is not changed.

    Args:
        transformer: the module.
        cuda_graphs: on a GPU, capture every kind of step, selection included, and replay it.
        compiled: the faster steps of `cat_pruning.engines.torch_compiled`; what they compute equals the module to
            rounding, not to the bit. torch.compile needs a compiler (on a CPU, C++), and seconds to tens of them at the
            first image of each shape and of each scale of an adapter. None: if the user had the module or blocks of it
            compiled.

    Where steps are captured or compiled, a new image sees that parameters were moved or replaced and adapters loaded,
    switched, scaled or fused since the last one. It sees no other change to the module's own attributes; with such,
    pass False for both. Adapters must not change while another thread generates with the module.

    Raises:
        CheckpointError: a transformer of no supported class, with other layers than its config says, or without values.
        SettingsError: a transformer whose attention processors or hooks its copy would lose.
    """

    name = "torch"
    takes_residuals = True

    def __init__(self, transformer: Any, *, cuda_graphs: bool = True, compiled: bool | None = None) -> None:
        if hasattr(transformer, "_orig_mod"):  # torch.compile(module)
            transformer, compiled = transformer._orig_mod, compiled is not False
        self.transformer = transformer
        self.compiled = compiles(transformer) if compiled is None else compiled
        self.family = family_of(transformer)
        self._wants_graphs = cuda_graphs
        StepModule(transformer, self.family)  # what cannot be intercepted is refused here, not at the first image
        tensors = (*transformer.named_parameters(), *transformer.named_buffers())
        if name := next((name for name, tensor in tensors if not has_values(tensor.device)), None):
            problem = f"{name} of the transformer is on the meta device, which has no values"
            raise CheckpointError(problem, "load its weights first")

    @property
    def cuda_graphs(self) -> bool:  # type: ignore[override]  # follows the module when it moves
        """Whether steps are captured: only where there is a GPU, and not under autocast, which casts in between."""
        return self._wants_graphs and self.device.type == "cuda" and not torch.is_autocast_enabled("cuda")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the module's weights are."""
        device: torch.device = next(self.transformer.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the module's weights, or what layerwise casting computes in."""
        name, weight = next(self.transformer.named_parameters())
        holder = self.transformer.get_submodule(name.rpartition(".")[0])
        # diffusers looks at every module, so it is asked only where a weight may be stored in another dtype.
        dtype: torch.dtype = self.transformer.dtype if hasattr(holder, "_diffusers_hook") else weight.dtype
        return dtype

    @override
    def session(self) -> TorchSession:
        return TorchSession(self)


class TorchSession(StepSession):
    """Caches updated in place by an intercepted copy of the module, which shares its weights."""

    engine: TorchStepEngine

    def __init__(self, engine: TorchStepEngine) -> None:
        super().__init__(engine)
        self._step: StepModule | None = None
        self._state: list[object] = []  # of the module when the copy was made
        self._modulations: ModulationStates | None = None
        self._caches: list[Tensor] = []

    def _allocate(self, dims: StepDims) -> None:
        engine = self.engine
        self._caches = [
            zeros(spec.shape(dims), engine.dtype, engine.device) for spec in engine.family.caches() for _ in range(2)
        ]

    def _free(self) -> None:
        super()._free()
        self._caches = []

    def _begin(self, dims: StepDims, timesteps: Sequence[float]) -> None:
        engine = self.engine
        state = _state_of(engine.transformer) if engine.cuda_graphs or engine.compiled else []
        if not state or not _same(self._state, state):
            # Without either, the copy is made anew for every image: it shares the module's parameters, but not later
            # changes, such as adapters that were loaded or switched off, or a move, which replaces buffers.
            self._graphs.clear()
            self._step = self._new_step()
            self._state = state
        if self._modulations is not None:
            self._modulations.begin(self._inputs, timesteps)

    def _new_step(self) -> StepModule:
        engine = self.engine
        if (engine.cuda_graphs or engine.compiled) and LAYERWISE_CASTING in hooks_of(engine.transformer):
            raise SettingsError(
                "layerwise casting moves the weights on every call, and captured or compiled steps read them where "
                "they were",
                "pass cuda_graphs=False and compiled=False to CatTransformer.from_model",
            )
        step = StepModule(engine.transformer, engine.family, in_place=True, modulated_ahead=engine.compiled)
        if engine.compiled:
            self._modulations = ModulationStates(step.transformer, engine.family)
            fuse_gelu(step.transformer)
            compile_blocks(step.transformer)
        return step

    def _load(self, timestep: float) -> None:
        self._inputs[TIMESTEP].fill_(timestep)
        if self._modulations is not None:
            self._modulations.load(timestep)

    def _run(self, keep_indices: Tensor) -> None:
        assert self._step is not None
        with compiler_errors() if self.engine.compiled else nullcontext():
            # A copy, because the kept rows are scattered in place, in FLUX into the very tensor that is given.
            noise, _ = self._step(keep_indices, self._noise.clone(), self._caches, self._inputs)
        self._noise.copy_(noise)


def _state_of(module: nn.Module) -> list[object]:
    """What makes a captured step of `module` stale when it changes: its parts, its memory, its adapters' settings.

    The parts themselves, so that none of them is gone and another has its address.
    """
    state: list[object] = []
    for part in module.modules():
        tensors = (*part._parameters.values(), *part._buffers.values())
        state += [part, len(part._forward_hooks), len(part._forward_pre_hooks), vars(part).get("forward")]
        state += [place for tensor in tensors if tensor is not None for place in _places_of(tensor)]
        layer: Any = part
        if isinstance(adapters := getattr(layer, "active_adapters", None), list):  # a layer of PEFT's
            merged = list(getattr(layer, "merged_adapters", ()))  # into the very memory of the weights
            state += [list(adapters), layer.disable_adapters, dict(getattr(layer, "scaling", {})), merged]
    return state


def _places_of(tensor: Any) -> list[tuple[int, torch.Size, torch.dtype]]:
    """Where a tensor's values lie; where those of its parts do if it is made of others, as torchao's are."""
    if is_traceable_wrapper_subclass(tensor):
        return [place for name in tensor.__tensor_flatten__()[0] for place in _places_of(getattr(tensor, name))]
    return [(tensor.data_ptr(), tensor.shape, tensor.dtype)]


def _same(one: list[object], other: list[object]) -> bool:
    return len(one) == len(other) and all(
        a is b if isinstance(a, nn.Module) else a == b for a, b in zip(one, other, strict=True)
    )
