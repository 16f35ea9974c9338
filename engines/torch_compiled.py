"""What `TorchStepEngine(compiled=True)` changes in its copy of the module: faster, and equal to rounding only.

1. `ModulationStates`: the linear layers of the adaptive norms, whose weights are a third of SD3's and are read on every
   step for a few rows, run once for all steps of a schedule.
2. `fuse_gelu`: GELU is computed by the matrix product that feeds it, not by a pass over its result.
3. `compile_blocks`: every block by torch.compile. Blocks of one kind share one graph for each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_pruning.engines.timestep_states import TimestepStates
from cat_pruning.errors import EngineError
from cat_pruning.families.family import Family
from cat_pruning.step_io import LATENTS, SYMBOLIC, Shape

MOST_GRAPHS: Final = 512  # of one kind of block: for each shape of a step, and scale of an adapter; torch has 8


class ModulationStates:
    """The results of a model's `Modulation`s, computed for many steps at once and put where its norms read them.

    The given copy's adaptive norms are changed in place: where their linear layer was, memory is.

    Args:
        copy: the module whose norms are to read them, and whose layers compute them.
        family: of it.
    """

    def __init__(self, copy: Any, family: Family) -> None:
        self._family = family
        self._modulations = family.modulations(copy)
        self._linears = [modulation.norm.linear for modulation in self._modulations]
        self._places = [_Given() for _ in self._modulations]
        for modulation, place in zip(self._modulations, self._places, strict=True):
            modulation.norm.silu, modulation.norm.linear = nn.Identity(), place
        if self._modulations:
            self._embed = copy.time_text_embed
            copy.time_text_embed = _NoEmbedding()  # nothing reads it any more
        self._memory: dict[str, Tensor] = {}  # (L, B, width) by name: L layers whose results are as wide
        self._states: TimestepStates | None = None

    def begin(self, inputs: Mapping[str, Tensor], timesteps: Sequence[float]) -> None:
        """Begin an image.

        Args:
            inputs: the model's inputs by name.
            timesteps: those that are expected, in order.
        """
        if not self._modulations:
            return
        batch, shapes = inputs[LATENTS].shape[0], self._family.input_shapes(SYMBOLIC)
        reads = {name: shapes[name] for name in self._family.timestep_inputs if name in shapes}
        self._allocate(batch, inputs[LATENTS])
        self._states = TimestepStates(self._run, reads, self._writes(), inputs, timesteps)

    def load(self, timestep: float) -> None:
        """Put one step's results in place. Does not synchronise with a GPU."""
        if self._states is not None:
            for name, states in self._states.at(timestep).items():
                self._memory[name].copy_(states)

    def _widths(self) -> dict[str, list[int]]:
        """The layers, by number, whose results are equally wide."""
        widths: dict[str, list[int]] = {}
        for index, linear in enumerate(self._linears):
            widths.setdefault(f"modulations_{linear.out_features}", []).append(index)
        return widths

    def _writes(self) -> dict[str, Shape]:
        return {
            name: (len(layers), SYMBOLIC.batch, self._linears[layers[0]].out_features)
            for name, layers in self._widths().items()
        }

    def _allocate(self, batch: int, like: Tensor) -> None:
        """Memory that stays where it is while steps have the same number of rows."""
        for name, (count, _, width) in self._writes().items():
            shape, memory = (count, batch, width), self._memory.get(name)
            if memory is None or (memory.shape, memory.dtype, memory.device) != (shape, like.dtype, like.device):
                self._memory[name] = like.new_zeros([int(size) for size in shape])
        for name, layers in self._widths().items():
            for row, layer in enumerate(layers):
                self._places[layer].states = self._memory[name][row]

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All modulations for the rows of many steps."""
        embedding = F.silu(self._family.timestep_embedding(self._embed, inputs))
        return {
            name: torch.stack([self._modulated(layer, embedding, inputs) for layer in layers])
            for name, layers in self._widths().items()
        }

    def _modulated(self, index: int, embedding: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        modulated: Tensor = self._linears[index](embedding)
        if factor := self._modulations[index].factor:
            name, place = factor
            # Shift, scale, gate, shift, scale, gate, ...: each as wide as the embedding.
            gates = modulated.view(modulated.shape[0], -1, 3, embedding.shape[1])[:, :, 2]
            gates *= inputs[name][place]
        return modulated


class _Given(nn.Module):
    """In the place of an adaptive norm's linear layer: its result, wherever it was computed."""

    states: Tensor

    def forward(self, embedding: Tensor) -> Tensor:
        return self.states


class _NoEmbedding(nn.Module):
    """In the place of the timestep's embedding."""

    def forward(self, *arguments: Tensor) -> Tensor:
        pooled = arguments[-1]
        return pooled.new_empty(pooled.shape[0], 0)


def fuse_gelu(module: nn.Module) -> None:
    """Let every linear layer that a GELU by tanh follows compute it too: `LinearGelu`. Changes `module` in place.

    Those of diffusers' FeedForward and of FLUX's single blocks. A layer that is none of torch's own, as with an
    adapter of PEFT, stays as it is, and so does one whose weights are quantized.
    """
    for part in list(module.modules()):
        inner: Any = part
        if type(part).__name__ == "GELU" and _is_plain(getattr(part, "proj", None)) and inner.approximate == "tanh":
            inner.proj, inner.gelu = LinearGelu(inner.proj), _same
        act = getattr(part, "act_mlp", None)
        if isinstance(act, nn.GELU) and act.approximate == "tanh" and _is_plain(inner.proj_mlp):
            inner.proj_mlp, inner.act_mlp = LinearGelu(inner.proj_mlp), nn.Identity()


class LinearGelu(nn.Module):
    """gelu(x W' + b), by tanh, as one matrix product: cuBLAS applies both to what it has just computed.

    Args:
        linear: whose weights are shared.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, 4 D)."""
        if not rows.is_cuda:  # on the CPU the operator below computes GELU by the error function
            return F.gelu(F.linear(rows, self.weight, self.bias), approximate="tanh")
        activated: Tensor = torch._addmm_activation(self.bias, rows.flatten(0, -2), self.weight.t(), use_gelu=True)
        return activated.view(*rows.shape[:-1], -1)


def _same(rows: Tensor) -> Tensor:
    return rows


def _is_plain(layer: object) -> bool:
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
        return False
    return layer.bias is not None and not layer._forward_hooks and not layer._forward_pre_hooks


def compile_blocks(transformer: Any, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the blocks, which are the items of the transformer's own module lists, and its `pos_embed`.

    In place, and at the first call of each. No shape is left open: a step's are few, and kernels made for one shape
    are the faster ones. Torch's limits on how many graphs a function may have are raised for the whole process.

    Args:
        transformer: the copy.
        backend: of torch.compile.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 16 * MOST_GRAPHS)
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
    for child in transformer.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            block.compile(**options)
    embed = transformer.pos_embed
    embed.forward = torch.compile(embed.forward, **options)  # without the hook that gathers from it


def compiles(module: nn.Module) -> bool:
    """Whether the user had `module` or a part of it compiled."""
    return any(part._compiled_call_impl is not None for part in module.modules())


@contextmanager
def compiler_errors() -> Iterator[None]:
    """What torch.compile cannot do as an EngineError."""
    try:
        yield
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise EngineError(
            f"torch.compile keeps {torch._dynamo.config.recompile_limit} graphs of a block, and this process has had "
            "more shapes and scales of adapters",
            "begin a new process, or pass compiled=False",
        ) from error
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).strip().splitlines()[:2])  # who failed, and why
        raise EngineError(f"torch.compile failed ({reason})", "pass compiled=False for steps that are not") from error
