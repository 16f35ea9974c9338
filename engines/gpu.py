"""The GPU of this machine, as far as plans depend on it."""

from __future__ import annotations

import ctypes
import re
import sys
import warnings
from typing import Any, Final

_CUDA: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MANAGEMENT: Final = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"


def gpu_architecture(device: int | None = None) -> str | None:
    """The architecture of a GPU (torch's current one) as plans name it, "sm90" for 9.0; None where there is no GPU."""
    import torch

    with warnings.catch_warnings(action="ignore"):  # of a driver that is too old: `missing_gpu` tells it
        if not torch.cuda.is_available():
            return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def gpu_file_name(device: int | None = None) -> str | None:
    """A GPU as file names tell it from others, "sm89-nvidia-l4"; None where there is no GPU."""
    import torch

    architecture = gpu_architecture(device)
    if architecture is None:
        return None
    return f"{architecture}-{re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name(device).lower()).strip('-')}"


def missing_gpu() -> str:
    """Why there is no GPU here, in torch's words: no driver, one that is too old, no device, a build without CUDA."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return "no device"


def describe_gpu(device: int | None = None) -> dict[str, Any]:
    """A GPU (torch's current one), its driver, what torch was built for; None for whatever is not there or not told.

    Returns:
        name, memory_bytes, architecture ("sm90"): of the GPU, where torch can use it.
        driver_version ("580.65.06") and driver_cuda_version ("13.0", the newest that it runs): of the driver.
        torch_cuda_version: that torch was built with.
    """
    import torch

    architecture = gpu_architecture(device)
    properties = torch.cuda.get_device_properties(device) if architecture else None
    return {
        "name": properties.name if properties else None,
        "memory_bytes": properties.total_memory if properties else None,
        "architecture": architecture,
        "driver_version": driver_version(),
        "driver_cuda_version": driver_cuda_version(),
        "torch_cuda_version": torch.version.cuda,
    }


def driver_cuda_version() -> str | None:
    """The newest CUDA that the driver runs, "13.0"; None without a driver. Torch tells nothing of one it cannot use."""
    number = ctypes.c_int()
    try:
        status = ctypes.CDLL(_CUDA).cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):  # no driver, or something else of that name
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if status == 0 else None


def driver_version() -> str | None:
    """NVIDIA's number of the driver, "580.65.06"; None without a driver, or without its management library."""
    text = ctypes.create_string_buffer(80)
    try:
        library = ctypes.CDLL(_MANAGEMENT)
        if library.nvmlInit_v2() != 0:
            return None
        status = library.nvmlSystemGetDriverVersion(text, len(text))
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return None
    return text.value.decode() if status == 0 else None
