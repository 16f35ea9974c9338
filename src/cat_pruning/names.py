"""Engines that run a bundle, and what an export builds and quantizes to, as manifests and command lines spell them."""

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


class Quantization(StrEnum):
    """The integers that the weights of an exported step are held in, where they are not in the export's dtype."""

    INT8 = "int8"  # activations too, as they come
    WEIGHTS_INT8 = "weights-int8"
    WEIGHTS_INT4 = "weights-int4"

    @property
    def options(self) -> list[str]:
        """Of `cat-export`, that ask for it."""
        kind, _, bits = self.rpartition("-")
        return ["--weights-only" if kind else "--quantize", bits]


def install_command(flavour: Flavour) -> str:
    """The command that installs a flavour's library."""
    return pip_install(flavour.replace("_", "-"))
