"""The token operators in ONNX: nodes `cat::TokenGather` and `cat::TokenScatter` with function bodies.

A runtime that knows the domain `cat` takes its own kernel; every other one (ONNX Runtime,
`onnx.reference`, TensorRT-RTX) takes the function body, written over GatherND and ScatterND
because ScatterElements would need the indices expanded to every channel.

TensorRT >= 10.15 prefers a plugin over the function only if the node itself carries
`plugin_namespace`; so each node carries the attributes below and each function declares them.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset

DOMAIN = "cat"
DOMAIN_VERSION = 1
PLUGIN_ATTRIBUTES: dict[str, str | int] = {"plugin_namespace": "cat", "plugin_version": "1", "aot": 1}
