"""sd3-mini exported for an engine, one image under it and under the torch engine: whether it runs here, and how close.

First, for TensorRT and TensorRT-RTX, the token operators alone, between guard bytes (`token_engines`): no model is run
where those are wrong. Then the model in every dtype, and in eight bits. What is refused, by the build or by the load,
is said in the library's own words, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from token_engines import check_token_engines

from cat_pruning import load_pipeline
from cat_pruning.bundle.bundle import Bundle
from cat_pruning.dtype import DType
from cat_pruning.engines.builder.build import plan_specs
from cat_pruning.errors import CatError, EngineError
from cat_pruning.exporter.export import ExportConfig, export
from cat_pruning.names import FLAVOURS, Flavour, Quantization, Target
from cat_pruning.settings import PruneSettings

PROMPT = "a large red circle left of a small blue star on a plain black background"
SIZE, STEPS, TEXT_LENGTH = 128, 28, 48
ENGINES = (*FLAVOURS, "onnxruntime")
CALIBRATION = "scenes:4"
Variant = tuple[DType, Quantization | None]
_OF_PLANS: tuple[Variant, ...] = (  # what deploys comes first
    (DType.BF16, None),
    (DType.BF16, Quantization.INT8_CALIBRATED),
    (DType.BF16, Quantization.FP8),
    (DType.FP16, None),
    (DType.FP32, None),
)
VARIANTS: dict[str, tuple[Variant, ...]] = {
    **dict.fromkeys(FLAVOURS, _OF_PLANS),
    "onnxruntime": ((DType.FP32, None),),
}


def main(argv: list[str] | None = None) -> int:
    """Export, load, sample, compare, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {}
    try:
        check(arguments.engine, result)
    except CatError as error:
        traceback.print_exc()
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    finally:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def check(engine: str, result: dict[str, Any]) -> None:
    """Fill `result` as far as it goes.

    Raises:
        CatError: the engine cannot be built or run here, or a token operator is wrong in it.
    """
    if engine in FLAVOURS:
        check_operators(engine, result)  # type: ignore[arg-type]
    refusals = []
    for dtype, quantization in VARIANTS[engine]:
        if quantization is Quantization.FP8 and not has_fp8():
            continue
        found = result.setdefault(", ".join(filter(None, (dtype, quantization))), {})
        try:
            check_model(engine, dtype, quantization, found)
        except CatError as error:  # the others are worth knowing all the same
            found["error"] = f"{type(error).__name__}: {error}"
            refusals.append(error)
    if refusals:
        raise refusals[0]


def check_operators(engine: Flavour, result: dict[str, Any]) -> None:
    """The token operators alone, into `result`: TensorRT's as plugins, TensorRT-RTX's as function bodies.

    Raises:
        EngineError: one is wrong.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    spec = plan_specs(engine, "plugin" if engine == "tensorrt" else "function")[-1]
    with tempfile.TemporaryDirectory() as folder:
        result["operators"] = found = check_token_engines(spec, Path(folder), device)
    if wrong := [each for each in found if each["problems"]]:
        first = wrong[0]
        raise EngineError(
            f"{len(wrong)} of {len(found)} engines of one token operator are wrong; the first, {first['operator']} of "
            f"{first['dtype']} at {first['size']}: {'; '.join(first['problems'])}"
        )


def has_fp8() -> bool:
    """Whether the GPU has products of fp8."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def check_model(engine: str, dtype: DType, quantization: Quantization | None, result: dict[str, Any]) -> None:
    """sd3-mini in one dtype, quantized or not, against the torch engine, which never is; into `result`.

    Raises:
        CatError: the engine cannot be built or run here.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "sd3-mini"
        targets = (Target.ONNX, *([Target(engine)] if engine in FLAVOURS else []))  # type: ignore[index]
        started = time.perf_counter()
        sizes = ((SIZE, SIZE),)
        config = ExportConfig(
            model="sd3-mini",
            out=out,
            dtype=dtype,
            quantization=quantization,
            calibration=None if quantization is None else CALIBRATION,
            text_length=TEXT_LENGTH,
            resolutions=sizes,
            targets=targets,
        )
        export(config)
        result["export_seconds"] = time.perf_counter() - started
        manifest = Bundle.open(out).manifest
        result["plans"] = [spec.model_dump(mode="json") for spec in manifest.plans]
        for name, settings in (("unpruned", PruneSettings(keep_ratio=1)), ("pruned", PruneSettings())):
            theirs, mine = _image(out, "torch", settings), _image(out, engine, settings)
            result[name] = {
                "largest_difference": float((mine["latents"] - theirs["latents"]).abs().max()),
                "spread": float(theirs["latents"].std()),
                "tokens_that_differ": sum(
                    len(set(a.tolist()) - set(b.tolist()))
                    for step, other in zip(mine["kept"], theirs["kept"], strict=True)
                    for a, b in zip(step, other, strict=True)
                ),
                "tokens": sum(step.numel() for step in theirs["kept"]),
                "finite": bool(mine["latents"].isfinite().all()),
            }


def _image(bundle: Path, engine: str, settings: PruneSettings) -> dict[str, Any]:
    """The latents of one image, and what every step computed."""
    pipe = load_pipeline(bundle, engine, settings=settings)
    pipe.set_progress_bar_config(disable=True)
    kept: list[torch.Tensor] = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, inputs, outputs: kept.append(module.last_step.keep_indices.cpu())
    )
    try:
        latents = pipe(
            PROMPT,
            height=SIZE,
            width=SIZE,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            max_sequence_length=TEXT_LENGTH - pipe.tokenizer_max_length,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    finally:
        hook.remove()
    return {"latents": latents.float().cpu(), "kept": kept}


if __name__ == "__main__":
    sys.exit(main())
