"""What a part of the project needs installed: the packages of the extras, and the platform."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Final

from cat_pruning.errors import InstallationError

# What an extra installs, as far as a tool cannot do without it; by the names that Python imports.
_EXPORT: Final = ("accelerate", "onnx_ir", "onnxscript")
_PICTURES: Final = ("matplotlib",)
PACKAGES: Final[dict[str, tuple[str, ...]]] = {
    "export": _EXPORT,
    "pictures": _PICTURES,
    "lora": ("peft",),
    "sign": ("cryptography",),
    "debug": ("polygraphy", *_EXPORT),
    "ray": ("ray",),
    "serve": ("fastapi", "httpx2", "prometheus_client", "uvicorn"),
    "eval": ("filelock", "jinja2", "scipy", *_EXPORT, *_PICTURES),
}


def pip_install(*extras: str) -> str:
    """The command that installs these extras."""
    return f"pip install 'cat-pruning[{','.join(extras)}]'"


def require(purpose: str, *extras: str) -> None:
    """Check that the packages of some extras are installed, without importing them.

    Args:
        purpose: what needs them, as the user calls it: "cat-export", "--token-map".
        extras: keys of `PACKAGES`.

    Raises:
        InstallationError: some are missing; it names them and the command that installs them.
    """
    missing = {extra: [name for name in PACKAGES[extra] if find_spec(name) is None] for extra in extras}
    names = [name for group in missing.values() for name in group]
    if names:
        command = pip_install(*(extra for extra, group in missing.items() if group))
        raise InstallationError(f"{purpose} needs {', '.join(names)}, not installed here", command)


def check_platform() -> None:
    """Check that this is Linux, where the project is tested and its engines run.

    Raises:
        InstallationError: it is not.
    """
    platform: str = sys.platform
    if platform != "linux":
        raise InstallationError(f"cat-pruning runs on Linux, and this is {platform}", "on Windows, take WSL")
