"""Valid inputs of this bundle's graphs, for Polygraphy. `cat-export` writes this file into every bundle.

    polygraphy run step.onnx     --onnxrt --data-loader-script data_loader.py
    polygraphy run step.onnx     --onnxrt --data-loader-script data_loader.py:load_full_step
    polygraphy run prompt.onnx   --onnxrt --data-loader-script data_loader.py:load_prompt
    polygraphy run timestep.onnx --onnxrt --data-loader-script data_loader.py:load_timestep

`--trt` beside `--onnxrt` needs `--trt-config-script data_loader.py` too: the graphs' dimensions are dynamic, and
Polygraphy would build for 1 of each.

It needs numpy and the `manifest.json` beside it, and takes the shapes of the bundle's first profile. Where ONNX Runtime
is installed, it runs the graphs for what one takes from the others: the states are those that prompt.onnx and
timestep.onnx compute, the caches and the last noise those of a full step. Where it is not, and for graphs in bf16,
which ONNX Runtime does not compute on a CPU, these are small random numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before it is imported; this script runs without cat-pruning

_BUNDLE = Path(__file__).resolve().parent
_NUMPY = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "float32", "INT32": "int32", "INT64": "int64"}
_TIMESTEP = 0.5  # a timestep of every family: FLUX counts from 1 to 0, the others from 1000
_STATES = 0.1  # of random states, among which are factors of everything that a layer computes

Inputs = dict[str, Any]  # by name: numpy arrays, and torch tensors in bf16, which numpy does not have


def load_data() -> Iterator[Inputs]:
    """The inputs of step.onnx at a pruned step: some of the tokens, in ascending order."""
    yield _typed("step", _step_inputs(full=False))


def load_full_step() -> Iterator[Inputs]:
    """The inputs of step.onnx at a full step: all tokens, and caches that hold nothing yet."""
    yield _typed("step", _step_inputs(full=True))


def load_prompt() -> Iterator[Inputs]:
    """The inputs of prompt.onnx."""
    yield _typed("prompt", _own_inputs("prompt"))


def load_timestep() -> Iterator[Inputs]:
    """The inputs of timestep.onnx, for one step."""
    yield _typed("timestep", _own_inputs("timestep"))


def load_config(builder: Any, network: Any = None) -> Any:
    """The configuration to build any of the graphs with, for TensorRT and TensorRT-RTX: no TF32, the shapes above.

    The network's attention layers are changed in place: they may become several kernels, because there is no fused one
    in fp32. Polygraphy asks for a configuration once before there is a network, for its parser, and once with it.
    """
    library = importlib.import_module(type(builder).__module__)
    config = builder.create_builder_config()
    config.clear_flag(library.BuilderFlag.TF32)
    if network is None:
        return config
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == library.LayerType.ATTENTION_INPUT:
            layer.__class__ = library.IAttentionInputLayer  # which the network returns as its base class
            layer.attention.decomposable = True
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    graph = next(graph for graph in _manifest()["graphs"] if {tensor["name"] for tensor in graph["inputs"]} == names)
    profile = builder.create_optimization_profile()
    for tensor in graph["inputs"]:
        pruned, full = (_shape(tensor, full=full) for full in (False, True))
        profile.set_shape(tensor["name"], pruned, pruned, full)
    config.add_optimization_profile(profile)
    return config


def _step_inputs(*, full: bool) -> Inputs:
    inputs = _own_inputs("step", full=True)
    if not _can_run():
        if not full:
            inputs = _own_inputs("step", full=False)
        return inputs
    for part in ("prompt", "timestep"):
        inputs |= _run(part, _own_inputs(part))
    inputs |= {name: np.zeros_like(value) for name, value in inputs.items() if _is_cache(name)}
    if full:
        return inputs
    results = _run("step", inputs)
    caches = {name: results[f"{name}_out"] for name in inputs if f"{name}_out" in results}
    return inputs | caches | {"keep_indices": _own_inputs("step", full=False)["keep_indices"]}


def _own_inputs(part: str, *, full: bool = False) -> Inputs:
    """Random inputs of one graph; the same ones on every call."""
    random = np.random.default_rng(0)
    inputs: Inputs = {}
    for tensor in _graph(part)["inputs"]:
        name, shape = tensor["name"], _shape(tensor, full=full)
        if name == "keep_indices":
            num_tokens = _manifest()["profiles"][0]["num_tokens"]
            rows = [np.sort(random.permutation(num_tokens)[: shape[1]]) for _ in range(shape[0])]
            inputs[name] = np.stack(rows)
        elif name == "timestep":
            inputs[name] = np.full(shape, _TIMESTEP)
        elif name.endswith(("_mask", "_gates")):
            inputs[name] = np.ones(shape)
        else:
            inputs[name] = random.standard_normal(shape) * (_STATES if "_states_" in name else 1.0)
    return {name: value.astype(_dtype(part, name)) for name, value in inputs.items()}


def _run(part: str, inputs: Inputs) -> Inputs:
    """What a graph computes, by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(_BUNDLE / f"{part}.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _can_run() -> bool:
    return _manifest()["dtype"] != "bf16" and importlib.util.find_spec("onnxruntime") is not None


def _is_cache(name: str) -> bool:
    return name.startswith(("key_cache_", "value_cache_"))


def _typed(part: str, inputs: Inputs) -> Inputs:
    """The inputs with those in bf16 as torch has them."""
    if all(tensor["dtype"] != "BFLOAT16" for tensor in _graph(part)["inputs"]):
        return inputs
    import torch

    in_bf16 = {tensor["name"] for tensor in _graph(part)["inputs"] if tensor["dtype"] == "BFLOAT16"}
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}  # all: Polygraphy takes no mixture
    return {name: value.to(torch.bfloat16) if name in in_bf16 else value for name, value in tensors.items()}


def _dtype(part: str, name: str) -> str:
    return _NUMPY[next(tensor["dtype"] for tensor in _graph(part)["inputs"] if tensor["name"] == name)]


def _shape(tensor: dict[str, Any], *, full: bool) -> tuple[int, ...]:
    profile = _manifest()["profiles"][0]
    sizes = profile | {"joint_rows": profile["num_tokens"] + profile["text_length"]}
    sizes["num_kept"] = profile["num_tokens"] if full else profile["num_kept"]
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor["shape"])


def _graph(part: str) -> dict[str, Any]:
    return next(graph for graph in _manifest()["graphs"] if graph["part"] == part)


def _manifest() -> dict[str, Any]:
    return dict(json.loads((_BUNDLE / "manifest.json").read_text(encoding="utf-8")))
