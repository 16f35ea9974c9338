"""What makes the next build, or the next start, of a bundle's engines faster; never needed, so never an error.

A bundle is immutable, so its caches lie beside it, in `{bundle}.cache/`: the timings that TensorRT measured of its
kernels, read and written by a build, and the kernels that TensorRT-RTX compiled for this GPU, read and written by the
runtime. Both libraries check that a cache is theirs and the GPU's, but not its bytes: those we hash.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from cat_pruning.bundle.schema import PlanSpec
from cat_pruning.engines.gpu import gpu_file_name
from cat_pruning.files import write_whole

logger = logging.getLogger(__name__)


def timing_cache_path(bundle: Path, plan: PlanSpec) -> Path:
    """Where the timings of TensorRT's kernels are kept, for every build with this version on this architecture."""
    return _cache_folder(bundle) / f"{plan.flavour}-{plan.version}-{'-'.join(plan.architectures)}.timing"


def runtime_cache_path(bundle: Path, plan: PlanSpec) -> Path:
    """Where the kernels that TensorRT-RTX compiled of `plan` are kept: those for this machine's kind of GPU."""
    built_for = gpu_file_name() or "-".join(plan.architectures)
    return _cache_folder(bundle) / f"{plan.flavour}-{plan.version}-{built_for}-{plan.part}.runtime"


def read_cache(path: Path) -> bytes | None:
    """What `write_cache` wrote; None, and a line in the log unless there is just none, where that is not there."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s cannot be read (%s) and is ignored", path, error.strerror)
        return None
    size = hashlib.sha256().digest_size
    digest, data = content[:size], content[size:]
    if hashlib.sha256(data).digest() != digest:
        logger.warning("%s is damaged and is ignored", path)
        return None
    return data


def write_cache(path: Path, data: bytes) -> None:
    """Replace the cache at `path`, at once or not at all; where it cannot be written, a line in the log says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, hashlib.sha256(data).digest() + data)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the next start will be slow again", path, error.strerror)


def _cache_folder(bundle: Path) -> Path:
    bundle = Path(os.path.abspath(bundle))  # noqa: PTH100  # a name for ".", and links as the user has them
    return bundle.with_name(f"{bundle.name}.cache")
