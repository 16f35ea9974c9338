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
    """The bits that an exported step's products are computed in, where that is not the export's dtype."""

    INT8 = "int8"  # activations as they come: ONNX Runtime only
    INT8_CALIBRATED = "int8-calibrated"  # activations by calibrated scales: every engine
    FP8 = "fp8"  # likewise
    WEIGHTS_INT8 = "weights-int8"  # activations are not quantized
    WEIGHTS_INT4 = "weights-int4"

    @property
    def is_calibrated(self) -> bool:
        """Whether the activations' scales were found on images of the model's."""
        return self in (Quantization.INT8_CALIBRATED, Quantization.FP8)

    @property
    def options(self) -> list[str]:
        """Of `cat-export`, that ask for it; those that are calibrated need `--calibrate` as well."""
        if self.value.startswith("weights-"):
            return ["--weights-only", self.value.removeprefix("weights-")]
        return ["--quantize", self.value.removesuffix("-calibrated")]


def install_command(flavour: Flavour) -> str:
    """The command that installs a flavour's library."""
    return pip_install(flavour.replace("_", "-"))
