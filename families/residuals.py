"""A ControlNet's residuals, as diffusers' transformers take them: lists that are spread over the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from cat_pruning.errors import SettingsError
from cat_pruning.step_io import is_residual


def residual_list(arguments: Mapping[str, Any], name: str) -> Sequence[Tensor]:
    """The residuals in an argument of a call; none where the pipeline passes none.

    Raises:
        SettingsError: it is no list of tensors.
    """
    given = arguments.get(name)
    if given is None:
        return ()
    if not isinstance(given, list | tuple) or not all(isinstance(each, Tensor) for each in given):
        raise SettingsError(
            f"{name}: expected a list of tensors, got {type(given).__name__}", "give what the ControlNet returns"
        )
    return given


def without_residuals(model_inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's inputs but for the residuals."""
    return {name: tensor for name, tensor in model_inputs.items() if not is_residual(name)}


def kept_residuals(model_inputs: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """A model's inputs with the kept tokens' rows in the place of each residual: (B, N, D) -> (B, n, D).

    Residuals that several blocks share are gathered once.
    """
    shared = {id(tensor): tensor for name, tensor in model_inputs.items() if is_residual(name)}
    kept = {key: gather(tensor) for key, tensor in shared.items()}
    return {name: kept.get(id(tensor), tensor) for name, tensor in model_inputs.items()}
