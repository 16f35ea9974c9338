"""Random weights for an architecture: the same for the same seed on every machine, and made only when needed.

Every parameter has a generator of its own, from the seed and its place in the model. So they can be filled in parallel,
or one at a time while they are written: an export with random weights holds none of them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from cat_pruning.dtype import DType
from cat_pruning.imports import diffusers_class
from cat_pruning.installation import require

_DEVIATION = 0.02


class RandomWeights:
    """The random parameters of one architecture, by name: N(0, 0.02²).

    Args:
        module: of the architecture; its parameters' names and shapes are read, not their values.
    """

    def __init__(self, module: nn.Module, dtype: DType, seed: int) -> None:
        named = list(module.named_parameters())
        self.dtype, self.seed = dtype, seed
        self.shapes = {name: parameter.shape for name, parameter in named}
        self._places = {name: index for index, (name, _) in enumerate(named)}

    def __call__(self, name: str) -> Tensor:
        """The parameter `name`, new memory."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._places[name])
        values = torch.empty(self.shapes[name], dtype=self.dtype.torch)
        return values.normal_(0.0, _DEVIATION, generator=generator)


def hollow_transformer(transformer_class: str, config: dict[str, Any], dtype: DType) -> nn.Module:
    """A transformer whose parameters are single zeros, expanded: of full size for the tracer, of none for the memory.

    Its buffers, such as position tables, are real.
    """
    module = _without_parameters(transformer_class, config, dtype)
    for name, parameter in list(module.named_parameters()):
        _set_parameter(module, name, torch.zeros((), dtype=dtype.torch).expand(parameter.shape))
    return module.eval()


def random_transformer(transformer_class: str, config: dict[str, Any], dtype: DType, seed: int) -> nn.Module:
    """A transformer of this architecture with `RandomWeights`, filled in parallel. Buffers are real."""
    module = _without_parameters(transformer_class, config, dtype)
    weights = RandomWeights(module, dtype, seed)
    with ThreadPoolExecutor() as pool:
        for name, values in zip(weights.shapes, pool.map(weights, weights.shapes), strict=True):
            _set_parameter(module, name, values)
    return module.eval()


def _without_parameters(transformer_class: str, config: dict[str, Any], dtype: DType) -> nn.Module:
    require("a transformer of random weights", "export")
    import accelerate

    transformer = diffusers_class(transformer_class)
    with accelerate.init_empty_weights(include_buffers=False):
        module: nn.Module = transformer(**config)
    for parent in module.modules():
        for name, buffer in parent.named_buffers(recurse=False):
            parent.register_buffer(name, buffer.to(dtype.torch) if buffer.is_floating_point() else buffer)
    return module


def _set_parameter(module: nn.Module, name: str, values: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
