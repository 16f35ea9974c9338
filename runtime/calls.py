"""What a call of a transformer says of the image that it is for, where nothing is known of it but its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from cat_pruning.errors import CheckpointError, SettingsError
from cat_pruning.runtime.timesteps import precision_of

# As diffusers' transformers call them.
_TIMESTEPS: Final = ("timestep", "timesteps", "t")
_LATENTS: Final = ("hidden_states", "x", "sample")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a transformer, without what it computes.

    Attributes:
        timestep: of all its rows; of timesteps that differ from token to token, the mean, which moves with any of them.
        precision: machine epsilon of the dtype that it came in; 0 of integers.
        form: the shapes and dtypes of all tensors, the other arguments themselves, and the cache context's name; alike
            in all calls that go on from each other.
        conditioning: the tensors that are neither latents nor timestep, in order.
    """

    timestep: Tensor
    precision: float
    form: Hashable
    conditioning: list[Tensor]


class CallReader:
    """Reads the calls of one transformer.

    Args:
        module: the transformer.

    Raises:
        CheckpointError: its `forward` takes no timestep that we know by its name.
    """

    def __init__(self, module: nn.Module) -> None:
        # A subclass may hand on what it gets: then the arguments are those of the class that it is of.
        forwards = [vars(each)["forward"] for each in type(module).__mro__ if "forward" in vars(each)]
        for forward in forwards:
            self._names = _parameters(forward)[1:]
            self._timestep = next((name for name in _TIMESTEPS if name in self._names), "")
            if self._timestep:
                break
        else:
            raise CheckpointError(
                f"a transformer of class {type(module).__name__} is not supported: its forward takes none of "
                f"{', '.join(_TIMESTEPS)}",
                "write a family for it: docs/adding-a-model.md",
            )
        self._latents = next((name for name in _LATENTS if name in self._names), self._names[0])

    def read(self, positional: Sequence[Any], named: Mapping[str, Any], context: str | None) -> Call:
        """Read one call. Synchronises with a GPU if its timesteps differ from token to token, or may.

        Args:
            positional: its arguments without names.
            named: the others.
            context: the name of diffusers' cache context that it is made in.

        Raises:
            SettingsError: it has no timestep, or no tensor for its latents.
        """
        arguments = dict(zip(self._names, positional, strict=False)) | dict(named)
        timestep = arguments.pop(self._timestep, None)
        latents: list[Tensor] = []
        conditioning: list[Tensor] = []
        form = (context, _form(arguments.pop(self._latents, None), latents), _form(arguments, conditioning))
        if not latents:
            raise SettingsError(f"{self._latents}: expected a tensor or a list of tensors")
        if isinstance(timestep, int | float):
            timestep = torch.tensor([timestep], dtype=torch.float64)
        if not isinstance(timestep, Tensor) or not timestep.numel():
            raise SettingsError(f"{self._timestep}: expected a tensor or a number, got {type(timestep).__name__}")
        return Call(
            timestep=_one(timestep),
            precision=precision_of(timestep),
            form=form,
            conditioning=conditioning,
        )


def _one(timestep: Tensor) -> Tensor:
    """A single value, or a view of one."""
    is_one = all(size == 1 or stride == 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True))
    return timestep if is_one else timestep.detach().cpu().double().mean()


def _form(value: Any, tensors: list[Tensor]) -> Hashable:
    """What stays alike from call to call; the tensors are collected."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.dtype
    if isinstance(value, Mapping):
        return tuple([(name, _form(each, tensors)) for name, each in value.items()])
    if isinstance(value, list | tuple):
        return tuple([_form(each, tensors) for each in value])
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return cast(Hashable, value if is_plain else type(value))


def _parameters(forward: Any) -> list[str]:
    """The names of a method's parameters; none of one that is not Python's, as of a TorchScript module."""
    try:
        return list(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return []
