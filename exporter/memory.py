"""Does this machine have the memory that an export needs? Told before the work, not in the middle of it."""

from __future__ import annotations

import math
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cat_pruning.checkpoints.checkpoint import Checkpoint
from cat_pruning.checkpoints.variants import without_other_variants
from cat_pruning.dtype import DType
from cat_pruning.errors import EngineError

# Of all weights' size, beside what Python and the libraries take. The builder holds 1.5 times the weights of one graph
# (benchmarks/RESULTS.md), and the largest, step.onnx, has 67 to 85 % of them. That is TensorRT-RTX's; TensorRT's, which
# measures kernels with the weights on the GPU besides, is taken to be the same until somebody has measured it.
_BUILDER_COPIES = 1.3
_BASE_BYTES = 2 << 30
_GIB = 1 << 30


def check_memory(weights_bytes: int, *, held_bytes: int, builds_plans: bool) -> None:
    """Check that weights of `weights_bytes` can be exported here.

    Args:
        weights_bytes: in the dtype of the export. The builder of a plan runs when the exporter has let them go.
        held_bytes: what the exporter itself holds of them; see `held_bytes`.
        builds_plans: whether plans are built.

    Raises:
        EngineError: the machine has less memory than that.
    """
    writing, building = held_bytes + _BASE_BYTES, int(weights_bytes * _BUILDER_COPIES) + _BASE_BYTES
    memory = total_memory()
    weights = f"weights of {weights_bytes / _GIB:.1f} GiB"
    if writing > memory:
        raise EngineError(
            f"{weights} need about {writing / _GIB:.0f} GiB of memory to be exported, and this machine has "
            f"{memory / _GIB:.0f} GiB",
            "in the dtype of the checkpoint's own files, and without adapters, they need not "
            "be held (--dtype), or export on a larger machine",
        )
    if builds_plans and building > memory:
        raise EngineError(
            f"{weights} need about {building / _GIB:.0f} GiB of memory for an engine to be built from them, and this "
            f"machine has {memory / _GIB:.0f} GiB",
            f"--target onnx needs about {writing / _GIB:.0f} GiB, engines can be "
            "built from the same command on a larger machine",
        )


def held_bytes(checkpoint: Checkpoint, dtype: DType, *, verify: bool) -> int:
    """The bytes of weights that an exporter of `checkpoint` allocates: all or none.

    Random weights are made one at a time while they are written. Safetensors files of the export's own dtype are
    mapped, so that the kernel reads a weight when it is written and may drop it afterwards. All others are converted
    when they are loaded; adapters change them; and --verify computes with them.
    """
    mapped = checkpoint.source.kind == "random" or (
        not checkpoint.source.in_memory
        and not checkpoint.source.loras
        and dtypes_on_disk(checkpoint.transformer_directory) == {_ON_DISK[dtype]}
    )
    return 0 if mapped and not verify else checkpoint.num_parameters * dtype.num_bytes


_ON_DISK = {DType.FP32: "F32", DType.FP16: "F16", DType.BF16: "BF16"}


def dtypes_on_disk(folder: Path | None) -> set[str]:
    """The dtypes of the weights that are loaded from a folder, as safetensors names them. Reads headers only."""
    dtypes: set[str] = set()
    for path in without_other_variants(folder.glob("*.safetensors") if folder else ()):
        try:
            with safe_open(path, framework="pt") as file:
                dtypes.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError):
            return set()  # which the load will tell
    return dtypes


def part_bytes(folder: Path, dtype: DType, *, verify: bool) -> tuple[int, int]:
    """The bytes in `dtype` of the weights of one of the pipeline's other parts, and what its exporter holds of them.

    Reads headers only. Weights of the export's own dtype are mapped, as those of the transformer are: see `held_bytes`.
    """
    count = 0
    for path in without_other_variants(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            return 0, 0  # which the load will tell
    weights = count * dtype.num_bytes
    return weights, 0 if dtypes_on_disk(folder) == {_ON_DISK[dtype]} and not verify else weights


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdigit() else memory
