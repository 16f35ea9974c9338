"""The GPU of this machine, as far as plans depend on it."""

from __future__ import annotations

import warnings


def gpu_architecture(device: int = 0) -> str | None:
    """The architecture of a GPU as plans name it, "sm90" for compute capability 9.0; None where there is no GPU."""
    import torch

    with warnings.catch_warnings(action="ignore"):  # of a driver that is too old: `missing_gpu` tells it
        if not torch.cuda.is_available():
            return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def missing_gpu() -> str:
    """Why there is no GPU here, in torch's words: no driver, one that is too old, no device, a build without CUDA."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return "no device"
