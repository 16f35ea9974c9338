"""The engines that run a bundle and the targets that an export builds, as manifests and command lines spell them."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Literal, get_args

from cat_pruning.installation import pip_install

Flavour = Literal["tensorrt", "tensorrt_rtx"]  # the two libraries whose plans a bundle may hold
FLAVOURS: Final[tuple[Flavour, ...]] = get_args(Flavour)
TITLES: Final[dict[Flavour, str]] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
ENGINES: Final = ("auto", *FLAVOURS, "onnxruntime", "torch")


class Target(StrEnum):
    """What an export builds: the ONNX graphs always, and plans from them."""

    ONNX = "onnx"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"


def install_command(flavour: Flavour) -> str:
    """The command that installs a flavour's library."""
    return pip_install(flavour.replace("_", "-"))
