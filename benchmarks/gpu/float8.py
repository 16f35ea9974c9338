"""Weights and activations in eight bits by torchao, under the compiled torch engine."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from gpu.case import Case, shared_case
from gpu.fast import contest, in_fp32
from gpu.profiles import profiles_of
from gpu.setting import LARGE_MODEL, Results, Setting

COMPILED = {"compiled": True}


def float8(setting: Setting) -> Results:
    """Steps and images in bf16 and in float8, all compiled; how far each is from fp32, of the large model from bf16."""
    case = shared_case(setting)
    reference = case if setting.model == LARGE_MODEL else in_fp32(case)
    cases = {"bf16": case, **{name: _quantized(case, config) for name, config in _configs(setting).items()}}
    yield from contest({name: (each, COMPILED) for name, each in cases.items()}, reference)
    # Last: the profiler may leave launches slower.
    first = next(name for name, each in cases.items() if each is not case)
    for kind, result in profiles_of(cases[first], captured=True, **COMPILED):
        yield f"profile of the {kind} step, {first}", result


def _configs(setting: Setting) -> dict[str, Any]:
    """Torchao's. A processor has no products of float8: there the weights are stored in it."""
    from torchao import quantization

    # Without the library's settings of the compiler, which search for minutes, and would hold for bf16 too.
    plainly = {"set_inductor_config": False}
    if setting.device.type == "cpu":
        return {"float8 weights": quantization.Float8WeightOnlyConfig(**plainly)}
    make = quantization.Float8DynamicActivationFloat8WeightConfig
    return {
        "float8, a scale for each row": make(granularity=quantization.PerRow(), **plainly),
        "float8, a scale for all": make(granularity=quantization.PerTensor(), **plainly),
    }


def _quantized(case: Case, config: Any) -> Case:
    """A copy whose blocks' linear layers are quantized, but for those of the adaptive norms."""
    from torchao.quantization import quantize_

    quantized = copy.copy(case)
    quantized.transformer = copy.deepcopy(case.transformer)
    quantize_(quantized.transformer, config, filter_fn=in_blocks)
    return quantized


def in_blocks(layer: nn.Module, name: str) -> bool:
    """Whether `layer` is a linear layer of a block, and not of its norms."""
    return isinstance(layer, nn.Linear) and "blocks." in name and ".norm" not in name
