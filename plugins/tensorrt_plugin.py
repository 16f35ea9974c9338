"""`cat::TokenGather` and `cat::TokenScatter` as plugins of TensorRT: declarations for its Python front end.

They are ahead-of-time plugins. TensorRT asks for a kernel once, while it builds, and writes the PTX into the engine,
which needs neither Python nor our package afterwards. What it launches is `cuda_kernels`: one kernel, no workspace, its
parameters being the inputs' addresses, then scalars, then the output's address.

TokenScatter works in place: its output is declared an alias of `tokens`, so a cache is changed where it is, and nothing
of it is copied. That takes the preview feature ALIASED_PLUGIN_IO_10_03 in the builder's config, and whoever runs the
engine has to bind a cache's input and output to one address: TensorRT does not report a plugin's aliases.

An index outside [0, N) moves nothing. (ONNX counts a negative one from the end, so there the function body differs; a
selection has none.) If an index comes twice, it is undefined which of the rows is found there.

A plugin belongs to a node by name, domain, and the attributes `onnx_ops.PLUGIN_ATTRIBUTES`; the declarations here have
no attributes of their own.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Final

from cat_pruning.errors import EngineError
from cat_pruning.plugins import DOMAIN
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

# What callbacks raised in this process: TensorRT writes it to standard error and reports a build that failed.
callback_errors: Final[list[str]] = []
_ELEMENT_BYTES: Final = {"FLOAT": 4, "HALF": 2, "BF16": 2}  # by TensorRT's names
_INDEX_BYTES: Final = {"INT32": 4, "INT64": 8}


def register_token_plugins(trt: Any) -> None:
    """Make TensorRT's builder know both plugins; before it parses a graph that has their nodes. Again does nothing.

    TensorRT calls the declarations later, while it builds. What they raise it does not pass on; `callback_errors` has
    it, and `compile_kernels` raises before the build what the kernels' own part of it would be.

    Args:
        trt: the module `tensorrt`. Never TensorRT-RTX, whose parser ends the process where a node has a plugin.

    Raises:
        EngineError: another module than TensorRT, or one without ahead-of-time plugins.
    """
    plugin = _plugin_module(trt)
    registered = getattr(plugin.op, DOMAIN, None)
    for name, declare in (("TokenGather", _declare_gather), ("TokenScatter", _declare_scatter)):
        if not hasattr(registered, name):
            declare(plugin, f"{DOMAIN}::{name}")


def _plugin_module(trt: Any) -> Any:
    if "rtx" in trt.__name__:
        raise EngineError("TensorRT-RTX takes no plugins, expected TensorRT; it runs the operators' ONNX functions")
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise EngineError(
            f"{trt.__name__} {getattr(trt, '__version__', '')} has no ahead-of-time plugins, expected TensorRT 10.15 "
            "or newer",
            "pip install 'cat-pruning[tensorrt]'",
        )
    try:
        return importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError as error:
        raise EngineError(f"TensorRT's plugins cannot be imported ({error})", "reinstall tensorrt") from error


def _declare_gather(plugin: Any, plugin_id: str) -> None:
    def describe(tokens: Any, indices: Any) -> Any:
        batch, _, width = tokens.shape_expr
        return plugin.from_shape_expr((batch, indices.shape_expr[1], width), tokens.dtype)

    def formats(tokens: Any, indices: Any, outputs: Any) -> Any:
        return _formats(plugin, tokens, indices, *outputs)

    def kernel(tokens: Any, indices: Any, outputs: Any, tactic: Any) -> Any:
        return _kernel(plugin, GATHER, tokens, indices)

    _declare(plugin, plugin_id, describe, formats, kernel)


def _declare_scatter(plugin: Any, plugin_id: str) -> None:
    def describe(tokens: Any, indices: Any, rows: Any) -> Any:
        return tokens.aliased()

    def formats(tokens: Any, indices: Any, rows: Any, outputs: Any) -> Any:
        return _formats(plugin, tokens, indices, rows, *outputs)

    def kernel(tokens: Any, indices: Any, rows: Any, outputs: Any, tactic: Any) -> Any:
        return _kernel(plugin, SCATTER, tokens, indices)

    _declare(plugin, plugin_id, describe, formats, kernel)


def _declare(
    plugin: Any, plugin_id: str, describe: Callable[..., Any], formats: Callable[..., Any], kernel: Callable[..., Any]
) -> None:
    # TensorRT reads the annotations at run time, and they are types of a module that we get as an argument.
    describe.__annotations__ = dict.fromkeys(describe.__annotations__, plugin.TensorDesc)
    formats.__annotations__ = {}
    kernel.__annotations__ = {"return": tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs]}
    plugin.register(plugin_id)(_remembered(describe))
    plugin.autotune(plugin_id)(_remembered(formats))
    plugin.aot_impl(plugin_id)(_remembered(kernel))


def _remembered(callback: Callable[..., Any]) -> Callable[..., Any]:
    """A callback whose error is kept in `callback_errors` on its way."""

    @functools.wraps(callback)  # its signature and annotations, which TensorRT reads
    def called(*arguments: Any, **keywords: Any) -> Any:
        try:
            return callback(*arguments, **keywords)
        except Exception as error:
            callback_errors.append(f"{type(error).__name__}: {error}")
            raise

    return called


def compile_kernels(tokens: Any, indices: Any) -> None:
    """Compile what a plugin with these inputs will be asked for: the network's tensors, (B, N, D) and (B, n).

    Raises:
        EngineError: a dtype that the kernels do not move, or NVRTC is missing or refuses the source.
    """
    element_bytes, index_bytes = _bytes(tokens.dtype, _ELEMENT_BYTES), _bytes(indices.dtype, _INDEX_BYTES)
    compile_ptx(Specialization.of(element_bytes, tokens.shape[2], index_bytes))


def _formats(plugin: Any, *tensors: Any) -> list[Any]:
    """The network's own types, densely packed: nothing is to be converted for the sake of a plugin."""
    return [plugin.AutoTuneCombination(", ".join(tensor.dtype.name for tensor in tensors), "LINEAR")]


def _kernel(plugin: Any, kernel: str, tokens: Any, indices: Any) -> tuple[str, str, Any, Any]:
    """A kernel's name, its PTX, its launch and its scalars; sizes are symbolic, for any profile's shapes."""
    element_bytes, index_bytes = _bytes(tokens.dtype, _ELEMENT_BYTES), _bytes(indices.dtype, _INDEX_BYTES)
    specialization = Specialization.of(element_bytes, tokens.shape[2], index_bytes)
    sizes = kernel_sizes(specialization, element_bytes, tokens.shape_expr, indices.shape_expr)
    scalars = plugin.SymIntExprs(len(sizes))
    for i, size in enumerate(sizes):
        scalars[i] = plugin.SymInt32(size)
    launch = plugin.KernelLaunchParams(
        grid_x=num_blocks(*indices.shape_expr), block_x=LANES, block_y=ROWS_PER_BLOCK, shared_mem=0
    )
    return specialization.entry(kernel), compile_ptx(specialization), launch, scalars


def _bytes(dtype: Any, known: dict[str, int]) -> int:
    if dtype.name not in known:
        raise EngineError(
            f"a token plugin got {dtype.name}, expected one of {', '.join(known)}", "export with another --dtype"
        )
    return known[dtype.name]
