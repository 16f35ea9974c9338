"""The token operators, gather and scatter of token rows, in torch and in ONNX."""

from __future__ import annotations

from typing import Final

DOMAIN: Final = "cat"  # of the operators, wherever they are named
