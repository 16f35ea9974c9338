"""A double of CUDA graphs for the CPU: what a body does to which memory is recorded, and done again to that memory.

Like a CUDA graph, and unlike a call of the body, a replay knows nothing of what has been allocated, bound or assigned
since; and whatever would make the host wait for the device, or read from it, cannot be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensorrt_double import TensorRTDouble
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_SYNCHRONISING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}


class RecordedGraph(TorchDispatchMode):
    """The operations of one body, on the tensors that they had."""

    def __init__(self) -> None:
        super().__init__()
        self._launches: list[Callable[[], object]] = []
        self._ran = True  # recording runs the body once, as the first replay does on a GPU

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SYNCHRONISING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **kwargs)
        if not _is_view(func):
            results = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
            writes = any(
                argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
            )

            def again() -> None:
                anew = func(*args, **kwargs)
                if not writes:
                    for old, new in zip(results, tree_flatten(anew)[0], strict=True):
                        old.copy_(new)

            self._launches.append(again)
        return result

    def add(self, launch: Callable[[], object]) -> None:
        """Record what torch does not see."""
        self._launches.append(launch)

    def replay(self) -> None:
        """Do it all again; the first time it has just been done."""
        if self._ran:
            self._ran = False
            return
        for launch in self._launches:
            launch()


def _is_view(func: Any) -> bool:
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)


def _is_written(alias: Any) -> bool:
    return alias is not None and bool(alias.is_write)


def recorder(library: TensorRTDouble | None = None) -> Callable[..., RecordedGraph]:
    """What stands in for `cuda_graphs.capture`; launches of the double of TensorRT are recorded too."""

    def capture(body: Callable[[], None], device: torch.device, others: Sequence[object]) -> RecordedGraph:
        graph = RecordedGraph()
        if library is not None:
            library.on_launch = graph.add
        try:
            with graph:
                body()
        finally:
            if library is not None:
                library.on_launch = None
        return graph

    return capture
