"""The process that builds one TensorRT-RTX plan: a job as JSON on standard input, one line of JSON when it fails.

The plan is streamed into its file while it is serialised, so that it never lies in memory as a whole.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is first imported


def build(onnx: Path, plan: Path, profiles: list[dict[str, list[list[int]]]]) -> None:
    """Build `plan` from `onnx` with one profile per entry of `profiles`: (min, opt, max) of every input by name.

    Raises:
        RuntimeError: the builder refused the graph; its own words.
        OSError: the plan cannot be written.
    """
    import tensorrt_rtx as trt
    from polygraphy.backend.tensorrt_rtx import create_config_rtx
    from polygraphy.backend.trt import Profile, network_from_onnx_path
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    builder, network, parser = network_from_onnx_path(str(onnx), strongly_typed=True)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # Where there is no fused kernel (fp32, some head widths), several kernels instead of no engine.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    shapes = [Profile() for _ in profiles]
    for profile, inputs in zip(shapes, profiles, strict=True):
        for name, (lowest, best, highest) in inputs.items():
            profile.add(name, min=lowest, opt=best, max=highest)
    config = create_config_rtx(builder, network, profiles=shapes)

    class PlanFile(trt.IStreamWriter):  # type: ignore[misc]  # from an untyped module
        def __init__(self, path: Path) -> None:
            trt.IStreamWriter.__init__(self)
            self.file = path.open("wb")
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return self.file.write(data)
            except OSError as error:  # must not cross the builder's frames
                self.error = error
                return 0

    output = PlanFile(plan)
    with output.file:
        built = builder.build_serialized_network_to_stream(network, config, output)
    if output.error is not None:
        raise output.error
    if not built:
        raise RuntimeError("the builder refused the graph")
    del parser  # it owns the weights that the network refers to, so it lives until here


def main() -> int:
    """Build the job on standard input; 0 when it is built."""
    from polygraphy.exception import PolygraphyException

    job: dict[str, Any] = json.load(sys.stdin)
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries log there too
    try:
        build(Path(job["onnx"]), Path(job["plan"]), job["profiles"])
    except OSError as error:
        report.write(json.dumps({"errno": error.errno, "problem": error.strerror}) + "\n")
        return 1
    except (RuntimeError, PolygraphyException) as error:
        report.write(json.dumps({"problem": str(error)}) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
