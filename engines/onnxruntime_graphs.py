"""Graphs under ONNX Runtime on torch's tensors, which are bound by their addresses: nothing is copied."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime
import torch
from torch import Tensor

from cat_pruning.engines.onnxruntime_sessions import ORT_ERRORS, quiet_run_options, quiet_session
from cat_pruning.engines.side_stream import SideStream
from cat_pruning.errors import EngineError

EXACT_PRODUCTS: Final = "session.x64quantprecision"  # uint8 x uint8; a graph in floating point has none to change

_ONNX_TYPES: Final = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int32: onnx.TensorProto.INT32,
}
_TORCH_TYPES: Final = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int32)": torch.int32,
}


def load_graph(path: Path, device: torch.device, stream: SideStream, replaced: Mapping[str, Any] | None = None) -> Any:
    """An ONNX Runtime session of a graph.

    Args:
        path: of the graph, with its external data beside it.
        device: the CPU, or a CUDA device.
        stream: where a CUDA provider computes.
        replaced: OrtValues in the place of some initializers, by name.

    Raises:
        EngineError: ONNX Runtime has no provider for the device, or cannot load the file.
    """
    options = onnxruntime.SessionOptions()
    # Between two runs the selection and the scheduler run in torch, on the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if device.type == "cpu":
        # Each graph would keep its largest activations of every shape; it is no faster with them.
        options.enable_cpu_mem_arena = False
        if _saturates_here():
            options.add_session_config_entry(EXACT_PRODUCTS, "1")
    replaced = replaced or {}
    for name, value in replaced.items():
        options.add_initializer(name, value)
    try:
        # Without a fallback: if a provider cannot be loaded, the user is told.
        graph = quiet_session(path, _providers(device, stream), options, enable_fallback=0)
    except ORT_ERRORS as error:
        raise EngineError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}") from error
    graph.replaced = replaced  # which it refers to and does not hold
    if device.type == "cuda" and "CUDAExecutionProvider" not in graph.get_providers():
        raise EngineError(
            f"the CUDA provider of ONNX Runtime {onnxruntime.__version__} cannot be loaded",
            "pip install 'onnxruntime-gpu[cuda,cudnn]', or take the engine torch",
        )
    return graph


def saturates(machine: str, cpuinfo: str) -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 may overflow 16 bits on a processor, and err by much.

    They do on x86 without VNNI. Where that is not known it is said, because exact products are right everywhere and
    only slower (`make bench-quantize`).

    Args:
        machine: as `platform.machine` says it.
        cpuinfo: of Linux; empty where there is none.
    """
    return machine.lower() in ("x86_64", "amd64") and not {"avx512_vnni", "avx_vnni"} & set(cpuinfo.split())


@functools.cache
def _saturates_here() -> bool:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    return saturates(platform.machine(), cpuinfo)


def run_options(device: torch.device) -> Any:
    """Options for runs on a device."""
    options = quiet_run_options()
    if device.type == "cuda":  # the stream keeps the order
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def run_graph(
    graph: Any,
    inputs: Mapping[str, Tensor],
    device: torch.device,
    stream: SideStream,
    options: Any,
    what: str,
    complete: Callable[[dict[str, int]], dict[str, int]] = dict,
) -> dict[str, Tensor]:
    """All outputs of a graph, new tensors. Does not synchronise with a GPU.

    Args:
        graph: see `load_graph`.
        inputs: by name, of the graph's dtypes and on its device.
        device: that it was loaded for.
        stream: likewise.
        options: see `run_options`.
        what: is run, for errors.
        complete: the sizes of all dynamic dimensions, by name, from those of the inputs.

    Raises:
        EngineError: ONNX Runtime failed.
    """
    binding = graph.io_binding()
    sizes: dict[str, int] = {}
    given = {value.name: inputs[value.name].detach().contiguous() for value in graph.get_inputs()}
    for value in graph.get_inputs():
        bind_tensor(binding.bind_input, value.name, given[value.name])
        sizes |= dict(zip(value.shape, given[value.name].shape, strict=False))
    sizes = complete(sizes)
    results = {
        value.name: torch.empty(
            [int(sizes.get(dim, dim)) for dim in value.shape], dtype=_TORCH_TYPES[value.type], device=device
        )
        for value in graph.get_outputs()
    }
    for name, result in results.items():
        bind_tensor(binding.bind_output, name, result)
    run_bound(graph, binding, stream, options, what)
    return results


def run_bound(graph: Any, binding: Any, stream: SideStream, options: Any, what: str) -> None:
    """Run a graph on bound memory. Does not synchronise with a GPU.

    Raises:
        EngineError: ONNX Runtime failed in `what`.
    """
    try:
        with stream.in_turn():  # the stream that the provider was given
            graph.run_with_iobinding(binding, options)
    except ORT_ERRORS as error:
        raise EngineError(f"ONNX Runtime failed in {what}: {error}") from error


def bind_tensor(bind: Any, name: str, tensor: Tensor) -> None:
    """Bind a contiguous tensor by its address, with `bind_input` or `bind_output` of a binding."""
    index = tensor.device.index or 0
    bind(name, tensor.device.type, index, _ONNX_TYPES[tensor.dtype], tensor.shape, tensor.data_ptr())


def ort_value(tensor: Tensor) -> Any:
    """A tensor for ONNX Runtime; on the CPU, over its own memory."""
    if tensor.dtype is torch.bfloat16:  # which numpy has not got
        bits = tensor.view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_TYPES[tensor.dtype])
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


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


def _providers(device: torch.device, stream: SideStream) -> list[Any]:
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise EngineError(
            f"this ONNX Runtime {onnxruntime.__version__} has no CUDA provider",
            "pip install onnxruntime-gpu in its place, or load the engine on the CPU",
        )
    options = {
        "device_id": str(device.index or 0),
        "user_compute_stream": str(stream.handle),
        "use_tf32": "0",  # fp32 is what was asked for, and what the other engines compute
        "arena_extend_strategy": "kSameAsRequested",
    }
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
