"""The CUDA kernels of the token operators on torch tensors, through the CUDA driver: to test and to measure them.

The engines never come here: TensorRT launches the same PTX with the same geometry by itself. Nothing synchronises but
`plugin_self_test`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor

from cat_pruning.errors import EngineError, ShapeError
from cat_pruning.plugins import token_ops
from cat_pruning.plugins.cuda_kernels import (
    GATHER,
    LANES,
    ROWS_PER_BLOCK,
    SCATTER,
    Specialization,
    compile_ptx,
    kernel_sizes,
    num_blocks,
)

_LARGEST_SIZE: Final = 2**31 - 1  # of an int32
_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
_INDEX_DTYPES: Final = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel: all that a driver is told.

    Attributes:
        kernel: `GATHER` or `SCATTER`.
        specialization: which compilation of it.
        blocks: the grid's x.
        parameters: input addresses, sizes, output address, as the kernel declares them.
    """

    kernel: str
    specialization: Specialization
    blocks: int
    parameters: tuple[int, ...]

    @classmethod
    def gather(cls, tokens: Tensor, indices: Tensor, gathered: Tensor) -> Self:
        """`gathered` (B, n, D) becomes the rows of `tokens` (B, N, D) at `indices` (B, n).

        Raises:
            ShapeError: shapes, strides or devices that do not fit together.
            EngineError: a dtype that the kernels do not move.
        """
        return cls._of(GATHER, [tokens, indices], gathered, rows=gathered)

    @classmethod
    def scatter(cls, tokens: Tensor, indices: Tensor, rows: Tensor) -> Self:
        """`tokens` (B, N, D) at `indices` (B, n) become `rows` (B, n, D), in place. Raises as `gather`."""
        return cls._of(SCATTER, [tokens, indices, rows], tokens, rows=rows)

    @classmethod
    def _of(cls, kernel: str, inputs: list[Tensor], output: Tensor, rows: Tensor) -> Self:
        tokens, indices = inputs[:2]
        shapes = [list(tensor.shape) for tensor in (tokens, indices, rows)]
        if not (tokens.dim() == 3 and indices.shape == rows.shape[:2] and rows.shape[::2] == tokens.shape[::2]):
            raise ShapeError(f"{kernel} got shapes {shapes}, expected tokens (B, N, D), indices (B, n), rows (B, n, D)")
        if not all(tensor.is_contiguous() and tensor.device == tokens.device for tensor in (*inputs, output)):
            raise ShapeError(f"{kernel} got tensors that are not contiguous or not on one device, expected both")
        if rows.dtype != tokens.dtype or tokens.dtype not in _DTYPES or indices.dtype not in _INDEX_DTYPES:
            raise EngineError(
                f"{kernel} got tokens of {tokens.dtype}, indices of {indices.dtype} and rows of {rows.dtype}, "
                "expected one of fp32, fp16 and bf16, and int32 or int64 indices"
            )
        specialization = Specialization.of(tokens.itemsize, tokens.shape[2], indices.itemsize)
        sizes = kernel_sizes(specialization, tokens.itemsize, tokens.shape, indices.shape)
        if max(sizes) > _LARGEST_SIZE:
            raise ShapeError(f"{kernel} got shapes {shapes}, expected dimensions of at most {_LARGEST_SIZE}")
        addresses = [tensor.data_ptr() for tensor in (*inputs, output)]
        return cls(kernel, specialization, num_blocks(*indices.shape), (*addresses[:-1], *sizes, addresses[-1]))

    @property
    def parameter_types(self) -> tuple[Any, ...]:
        """The C types of the parameters."""
        num_inputs = len(self.parameters) - 5  # four sizes and an output
        return (*[ctypes.c_void_p] * num_inputs, *[ctypes.c_int] * 4, ctypes.c_void_p)

    def run(self, device: torch.device) -> None:
        """Enqueue on the current stream of the tensors' device; the tensors must live until that is done.

        Raises:
            EngineError: the driver refuses the PTX or the launch, or cuda-bindings is not installed.
        """
        driver = _driver()
        with torch.cuda.device(device):
            context, function = _load(self.kernel, self.specialization, torch.cuda.current_device())
            stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
            _check("cuCtxSetCurrent", driver.cuCtxSetCurrent(context))  # torch sets it late, and per thread
            parameters = (self.parameters, self.parameter_types)
            grid, block = (self.blocks, 1, 1), (LANES, ROWS_PER_BLOCK, 1)
            _check("cuLaunchKernel", driver.cuLaunchKernel(function, *grid, *block, 0, stream, parameters, 0))


def gather(tokens: Tensor, indices: Tensor) -> Tensor:
    """`token_ops.token_gather` by our kernel: (B, N, D) and (B, n) -> (B, n, D), new memory, on a CUDA device.

    Raises as `Launch`.
    """
    gathered = tokens.new_empty(*indices.shape, tokens.shape[-1])
    Launch.gather(tokens, indices, gathered).run(tokens.device)
    return gathered


def scatter_(tokens: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """`token_ops.token_scatter_` by our kernel: `tokens` itself is changed and returned. Raises as `Launch`."""
    Launch.scatter(tokens, indices, rows).run(tokens.device)
    return tokens


def plugin_self_test(device: torch.device) -> None:
    """Run both kernels on `device` over sizes, dtypes and addresses, and compare with torch, to the bit. Synchronises.

    Raises:
        EngineError: a kernel's result differs, or it cannot be run at all.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise EngineError(f"the plugin's kernels cannot be tested on {device}; expected a CUDA device and its driver")
    for name, tokens, indices, rows in self_test_cases(device):
        if not torch.equal(gather(tokens, indices), token_ops.token_gather(tokens, indices)):
            raise EngineError(f"{GATHER} differs from torch for {name} on {torch.cuda.get_device_name(device)}")
        expected = token_ops.token_scatter(tokens, indices, rows)
        if not torch.equal(scatter_(tokens, indices, rows), expected):
            raise EngineError(f"{SCATTER} differs from torch for {name} on {torch.cuda.get_device_name(device)}")


def self_test_cases(device: torch.device) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """A description, tokens, indices, rows: words of every width, rows amid other memory, none to all of the tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 1, 1, 1), (2, 333, 100, 1536), (3, 40, 40, 6), (2, 65, 17, 12), (1, 9, 0, 64), (5, 7, 3, 1025)]
    for dtype, index_dtype, size, shift in itertools.product(_DTYPES, _INDEX_DTYPES, sizes, (0, 1)):
        batch, num_tokens, num_kept, width = size
        order = torch.rand(batch, num_tokens, generator=generator).argsort(1)
        indices = order[:, :num_kept].contiguous().to(device, index_dtype)
        tokens, rows = (
            torch.randn(shift + batch * count * width, generator=generator)
            .to(device, dtype)[shift:]
            .view(batch, count, width)
            for count in (num_tokens, num_kept)
        )
        yield f"{dtype}, {index_dtype}, (B, N, n, D) = {size}, {shift} elements in", tokens, indices, rows


@functools.cache
def _load(kernel: str, specialization: Specialization, device_index: int) -> tuple[Any, Any]:
    """The device's primary context, which torch uses too, and the kernel in it; both stay for the process's life."""
    driver = _driver()
    (device,) = _check("cuDeviceGet", driver.cuDeviceGet(device_index))
    (context,) = _check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(device))
    _check("cuCtxSetCurrent", driver.cuCtxSetCurrent(context))
    (module,) = _check("cuModuleLoadData", driver.cuModuleLoadData(compile_ptx(specialization).encode() + b"\0"))
    (function,) = _check(
        "cuModuleGetFunction", driver.cuModuleGetFunction(module, specialization.entry(kernel).encode())
    )
    return context, function


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver

        _check("cuInit", driver.cuInit(0))  # the library is looked for at the first call, not at the import
    except (ImportError, RuntimeError) as error:
        remedy = "install NVIDIA's driver, and pip install 'cat-pruning[tensorrt]'"
        raise EngineError(f"the CUDA driver cannot be called ({error})", remedy) from error
    return driver


def _check(call: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *values = result
    if status != 0:
        raise EngineError(f"{call} failed with {status.name}; our CUDA kernels need a driver of CUDA 12.0 or newer")
    return tuple(values)
