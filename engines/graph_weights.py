"""The weights that an export wrote, read one at a time, and what they become when a module's weight is changed.

An initializer of a graph is named after the parameter that it holds: `transformer.{parameter}`, or
`transformer.{parameter}.T` where the transpose was folded. `GraphWeights.changed` is the one place where a change of a
parameter becomes a change of its initializers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from cat_pruning.errors import BundleError, EngineError
from cat_pruning.step_io import Part

_PREFIX, _TRANSPOSED = "transformer.", ".T"
_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """One initializer: where its bytes are, in a file, or here if they are few."""

    transposed: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    content: bytes | None


class GraphWeights:
    """The floating-point initializers of `{part}.onnx` by name, constants too. Read when they are asked for.

    Args:
        directory: where the graphs are, with their external data beside them.

    Raises:
        BundleError: a graph cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._stored: dict[str, _Stored] = {}  # the graphs are parts of one, so a name means the same in each
        self.parts: dict[str, set[Part]] = {}  # the graphs that have an initializer, by its name
        self._of_parameter: dict[str, list[str]] = {}
        for part in Part:
            path = directory / part.onnx
            try:
                graph = onnx.load(path, load_external_data=False).graph
            except (OSError, ValueError) as error:
                raise BundleError(f"{path} cannot be read ({error})", "run cat-export again") from error
            for tensor in graph.initializer:
                if tensor.data_type in _DTYPES:
                    self._add(part, tensor, directory)

    def _add(self, part: Part, tensor: TensorProto, directory: Path) -> None:
        self.parts.setdefault(tensor.name, set()).add(part)
        if tensor.name in self._stored:
            return
        external = {entry.key: entry.value for entry in tensor.external_data}
        self._stored[tensor.name] = _Stored(
            transposed=tensor.name.endswith(_TRANSPOSED),
            dtype=_DTYPES[tensor.data_type],
            shape=tuple(tensor.dims),
            file=directory / external.get("location", part.onnx),
            offset=int(external.get("offset", 0)),
            content=None if external else _inline_bytes(tensor),
        )
        if tensor.name.startswith(_PREFIX):
            parameter = tensor.name.removeprefix(_PREFIX).removesuffix(_TRANSPOSED)
            self._of_parameter.setdefault(parameter, []).append(tensor.name)

    def initializers(self, parameter: str) -> tuple[str, ...]:
        """The initializers that hold a parameter of the transformer; none if no graph has it."""
        return tuple(self._of_parameter.get(parameter, ()))

    def read(self, name: str) -> Tensor:
        """An initializer as the export wrote it, on the CPU: a copy-on-write view of its file.

        Raises:
            BundleError: its file cannot be read.
            EngineError: the graphs have none of this name.
        """
        if name not in self._stored:
            raise EngineError(f"the graphs have no weights {name}")
        stored = self._stored[name]
        if stored.content is not None:
            return torch.frombuffer(bytearray(stored.content), dtype=stored.dtype).reshape(stored.shape)
        size = math.prod(stored.shape) * stored.dtype.itemsize
        try:
            content = np.memmap(stored.file, mode="c", offset=stored.offset, shape=(size,))
        except (OSError, ValueError) as error:
            raise BundleError(f"{stored.file}: {name} cannot be read ({error})", "run cat-export again") from error
        return torch.from_numpy(content).view(stored.dtype).reshape(stored.shape)

    def changed(self, name: str, change: Tensor) -> Tensor:
        """An initializer whose parameter is changed by `change`: added in fp32, rounded once to its dtype.

        Args:
            name: of the initializer.
            change: what is added to the parameter, in the parameter's own shape.
        """
        stored = self._stored[name]
        change = change.t().float() if stored.transposed else change.float()
        return (self.read(name).float() + change).to(stored.dtype).contiguous()


def _inline_bytes(tensor: TensorProto) -> bytes:
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    return onnx.numpy_helper.to_array(tensor).tobytes()
