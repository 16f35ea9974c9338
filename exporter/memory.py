"""Does this machine have the memory that an export needs? Told before the work, not in the middle of it."""

from __future__ import annotations

import os
from pathlib import Path

from cat_pruning.engines.records import Source
from cat_pruning.errors import EngineError

# Of the weights' size, beside what Python and the libraries take: measured on the builds of SD3-medium in
# benchmarks/RESULTS.md, where the builder's process held 1.9 times the weights.
_BUILDER_COPIES = 2.0
_BASE_BYTES = 2 << 30
_GIB = 1 << 30


def check_memory(weights_bytes: int, *, builds_plans: bool, source: Source) -> None:
    """Check that the weights of `weights_bytes` can be exported from `source` here.

    Random weights are made one at a time while they are written; others are held once. The builder of a plan, which
    runs when they are let go, holds them twice.

    Raises:
        EngineError: the machine has less memory than that.
    """
    held = 0 if source.kind == "random" else weights_bytes
    writing, building = held + _BASE_BYTES, int(weights_bytes * _BUILDER_COPIES) + _BASE_BYTES
    memory = total_memory()
    weights = f"weights of {weights_bytes / _GIB:.1f} GiB"
    if writing > memory:
        raise EngineError(
            f"{weights} need about {writing / _GIB:.0f} GiB of memory to be exported, and this machine has "
            f"{memory / _GIB:.0f} GiB; export with --dtype bf16 if it was another one, or on a larger machine"
        )
    if builds_plans and building > memory:
        raise EngineError(
            f"{weights} need about {building / _GIB:.0f} GiB of memory for an engine to be built from them, and this "
            f"machine has {memory / _GIB:.0f} GiB; --target onnx needs about {writing / _GIB:.0f} GiB, engines can be "
            "built from the same command on a larger machine"
        )


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdigit() else memory
