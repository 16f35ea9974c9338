"""The products of a step in eight or four bits.

What is calibrated is written by `cat_pruning.exporter.quantize_pairs`, for every engine; the rest by ONNX Runtime's own
quantizers, for it alone.

Only the matrix products of `step.onnx` with constant weights change, and of these not the first that the latents go
through (the patch embedding) nor the last (the output projection). What `prompt.onnx` and `timestep.onnx` compute, the
modulation among it, stays as it is: it is computed once for an image.
"""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import onnx
from torch import Tensor

from cat_pruning import step_io
from cat_pruning.dtype import DType
from cat_pruning.errors import SettingsError
from cat_pruning.exporter.quantize_pairs import write_pairs
from cat_pruning.names import Quantization, Target
from cat_pruning.step_io import Part

_BITS_AND_BLOCK: Final = {Quantization.WEIGHTS_INT8: (8, 128), Quantization.WEIGHTS_INT4: (4, 32)}
# Of the weights' size, above what the exporter holds: 3.0 and 1.3 were measured on 150 MB. Dynamic quantization copies.
_COPIES: Final = {Quantization.INT8: 3.0, Quantization.WEIGHTS_INT8: 1.5, Quantization.WEIGHTS_INT4: 1.5}
_ACTIVATIONS_INT8: Final = 4  # `accuracy_level` of MatMulNBits: products of 8-bit integers
_PREPROCESSED: Final = ("onnx.quant.pre_process", "onnxruntime.quant")


def check_quantization(
    quantization: Quantization | None,
    calibration: str | None,
    unquantized: Collection[str],
    dtype: DType,
    targets: Collection[Target],
) -> None:
    """Check, before the work, that an export can be quantized.

    Raises:
        SettingsError: not in this dtype, not with plans, or not without a calibration.
    """
    if quantization is None:
        if calibration is not None or unquantized:
            option = "--unquantized" if calibration is None else "--calibrate"
            raise SettingsError(f"{option}: nothing is quantized", "give --quantize int8 or fp8, or leave it out")
        return
    option = " ".join(quantization.options)
    if quantization.is_calibrated != (calibration is not None):
        if quantization.is_calibrated:
            raise SettingsError(
                f"{option}: its activations' scales are found on images, and no prompts are given",
                "give --calibrate scenes:8, or a file of prompts",
            )
        raise SettingsError(f"{option} --calibrate: it quantizes no activations", "leave out --calibrate")
    if quantization.is_calibrated:
        if dtype is DType.FP16:
            raise SettingsError(
                f"{option} --calibrate --dtype fp16: sums of products of eight-bit values leave fp16's range",
                "give --dtype bf16 for plans, or fp32",
            )
        return
    if dtype is not DType.FP32:
        raise SettingsError(
            f"{option} --dtype {dtype}: what stays in floating point is computed in fp32", "leave out --dtype"
        )
    if flavours := [target for target in targets if target is not Target.ONNX]:
        raise SettingsError(
            f"{option} --target {flavours[0]}: such a step is ONNX Runtime's, and no plans are built from it",
            "give --target onnx, or --quantize int8 or fp8 with --calibrate",
        )


def quantizer_bytes(quantization: Quantization | None, weights_bytes: int) -> int:
    """The memory that `quantize_step` takes for weights of `weights_bytes`; where it reads one at a time, none."""
    return int(_COPIES.get(quantization, 0) * weights_bytes) if quantization is not None else 0


def quantize_step(
    directory: Path,
    quantization: Quantization,
    *,
    ranges: Mapping[str, Tensor] | None = None,
    unquantized: Collection[str] = (),
    keep_ends: bool = True,
) -> None:
    """Quantize `step.onnx` in its place, and its weights in `step.onnx.data`.

    int8 is dynamic quantization (`onnxruntime.quantization.quantize_dynamic`): weights are symmetric int8 with a scale
    for each output channel; activations become uint8 in the step, with one scale and zero point for a whole tensor, so
    nothing is calibrated. The calibrated ones: see `quantize_pairs`. The others are `MatMulNBits`: symmetric weights
    with a scale for each block of 128 (8 bits) or 32 (4 bits) values of a column. `quantizer_bytes` says how much
    memory they take.

    Args:
        directory: where the graph is, with its weights beside it; in fp32, or in bf16 where it is calibrated.
        quantization: of the products.
        ranges: of a calibrated one: see `Calibration`.
        unquantized: patterns of linear layers' names in the transformer, as the shell has them, that stay as they are.
        keep_ends: keep the patch embedding and the output projection as they are.

    Raises:
        SettingsError: as `quantized_products`.
        EngineError: a product whose layer has no range.
        OSError: a file cannot be read or written.
    """
    path = directory / Part.STEP.onnx
    model = onnx.load(path, load_external_data=False)
    nodes = quantized_products(model.graph, unquantized, keep_ends=keep_ends)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".quantize-") as folder:
        out = Path(folder) / path.name
        if quantization.is_calibrated:
            reached = {f"transformer.{layer}.weight.T": each.numpy() for layer, each in (ranges or {}).items()}
            write_pairs(path, out, nodes, reached, quantization)
        elif quantization is Quantization.INT8:
            _dynamic(model, path, out, nodes)
        else:
            _weights_only(path, out, nodes, *_BITS_AND_BLOCK[quantization])
        for file in Path(folder).iterdir():
            file.replace(directory / file.name)


def check_patterns(directory: Path, unquantized: Collection[str]) -> None:
    """Check the patterns of layers that are to stay as they are against `step.onnx`, before images are made for it.

    Raises:
        SettingsError: as `quantized_products`.
    """
    if unquantized:
        quantized_products(onnx.load(directory / Part.STEP.onnx, load_external_data=False).graph, unquantized)


def quantized_products(
    graph: onnx.GraphProto, unquantized: Collection[str] = (), *, keep_ends: bool = True
) -> list[str]:
    """The names of the nodes that are quantized: matrix products with constant weights, in the graph's order.

    Args:
        graph: of a step.
        unquantized: see `quantize_step`.
        keep_ends: without those that are the first or the last on a way from the latents to the noise.

    Raises:
        SettingsError: a pattern that no product has, or patterns that all have.
    """
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Conv") and node.input[1] in weights]
    kept = _first(graph, products) | _last(graph, products) if keep_ends else set()
    layers = {
        node.name: node.input[1].removeprefix("transformer.").removesuffix(".weight.T")
        for node in products
        if node.op_type == "MatMul" and node.name not in kept
    }
    for pattern in unquantized:
        if not fnmatch.filter(layers.values(), pattern):
            example = next(iter(layers.values()), "transformer_blocks.0.attn.to_q")
            raise SettingsError(
                f"--unquantized {pattern}: no layer that would be quantized is called so",
                f"layers are called as {example} is; * stands for any characters",
            )
    found = [
        node for node, layer in layers.items() if not any(fnmatch.fnmatchcase(layer, each) for each in unquantized)
    ]
    if unquantized and not found:
        raise SettingsError(
            f"--unquantized {' '.join(unquantized)}: no layer is left to be quantized",
            "leave out a pattern, or export without quantization",
        )
    return found


def _first(graph: onnx.GraphProto, products: list[Any]) -> set[str]:
    """The products that the latents reach through no other."""
    names, found = {node.name for node in products}, set()
    reached = {step_io.LATENTS}
    for node in graph.node:
        if node.op_type != "Shape" and reached.intersection(node.input):
            if node.name in names:
                found.add(node.name)
            else:
                reached.update(node.output)
    return found


def _last(graph: onnx.GraphProto, products: list[Any]) -> set[str]:
    """The products that reach the noise through no other."""
    names, found = {node.name for node in products}, set()
    reaching = {step_io.output_name(step_io.NOISE)}
    for node in reversed(graph.node):
        if reaching.intersection(node.output):
            if node.name in names:
                found.add(node.name)
            else:
                reaching.update(node.input)
    return found


def _dynamic(model: onnx.ModelProto, path: Path, out: Path, nodes: list[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Without this mark the library advises, by a warning of the root logger, to simplify the graph, which it is.
    model.metadata_props.add(key=_PREPROCESSED[0], value=_PREPROCESSED[1])
    path.write_bytes(model.SerializeToString())
    quantize_dynamic(
        path,
        out,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=nodes,
        use_external_data_format=True,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def _weights_only(path: Path, out: Path, nodes: list[str], bits: int, block_size: int) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(path)
    others = [node.name for node in model.graph.node if node.name not in set(nodes)]
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=block_size,
        is_symmetric=True,
        accuracy_level=_ACTIVATIONS_INT8,
        nodes_to_exclude=others,
        op_types_to_quantize=("MatMul",),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), True)
