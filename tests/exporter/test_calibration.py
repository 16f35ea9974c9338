"""Ranges of a model's own images, and an export that is quantized by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.schema import ProfileSpec
from cat_pruning.checkpoints.checkpoint import find_checkpoint, load_transformer
from cat_pruning.dtype import DType
from cat_pruning.errors import EngineError
from cat_pruning.exporter.calibration import Calibration, calibrate, full_step, watched
from cat_pruning.exporter.export import ExportConfig, export
from cat_pruning.exporter.step_graph import example_inputs, run_step
from cat_pruning.exporter.verify import Verify
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.models import miniatures
from cat_pruning.names import Quantization, Target
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part
from cat_pruning.tools import bundle_cli
from cat_pruning.tools.generate import GenerateConfig, generate, never_pruned

CatExport = Callable[..., tuple[int, str, list[str]]]
TEXT = "a large red circle left of a small blue star on a plain black background"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """sd3-mini in int8, calibrated on one image of three steps; without its last block."""
    out, original = tmp_path_factory.mktemp("calibrated") / "sd3-mini", StableDiffusion3Pipeline.__call__

    def few_steps(pipe: Any, *arguments: Any, **more: Any) -> Any:
        return original(pipe, *arguments, num_inference_steps=3, **more)

    config = ExportConfig(
        model="sd3-mini",
        out=out,
        quantization=Quantization.INT8_CALIBRATED,
        calibration="scenes:1",
        unquantized=("transformer_blocks.5.*",),
        targets=(Target.ONNX,),
        verify=Verify.OUTPUTS,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion3Pipeline, "__call__", few_steps)
        return export(config)


def test_the_layers_are_watched_and_left_as_they_were() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.GELU(), torch.nn.Linear(2, 1))
    with watched(module) as largest:
        module(torch.tensor([[[1.0, -2.0, 0.0], [-3.0, 1.0, 0.5]]]))
        module(torch.tensor([[0.0, 4.0, 0.0]]))
    assert largest["0"].tolist() == [3.0, 4.0, 0.5]
    assert set(largest) == {"0", "2"}
    module(torch.full((1, 3), 9.0))
    assert largest["0"].tolist() == [3.0, 4.0, 0.5]


def test_layers_of_the_same_weights_have_what_all_are_given() -> None:
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.weight = first.weight
    module = torch.nn.ModuleList([first, second, first])
    with watched(module) as largest:
        first(torch.tensor([[1.0, 2.0]]))
        second(torch.tensor([[-3.0, 0.0]]))
    assert {name: reached.tolist() for name, reached in largest.items()} == {key: [3.0, 2.0] for key in "012"}


@pytest.mark.long
def test_an_export(calibrated: Bundle) -> None:
    manifest = calibrated.manifest
    assert (manifest.quantization, manifest.calibration) == (Quantization.INT8_CALIBRATED, "scenes:1")
    told = " --quantize int8 --calibrate scenes:1 --unquantized 'transformer_blocks.5.*' "
    assert told in calibrated.export_command()
    assert manifest.add_plans_command(calibrated.path, "tensorrt_rtx").startswith("cat-export --add-plans ")
    nodes = onnx.load(calibrated.path / Part.STEP.onnx, load_external_data=False).graph.node
    plain = {node.input[1] for node in nodes if node.op_type == "MatMul" and node.input[1].endswith(".weight.T")}
    blocks = [name.split(".")[1:3] for name in plain if "transformer_blocks" in name]
    assert {block for _, block in blocks} == {"5"}
    assert len(plain) == len(blocks) + 1  # the output projection


@pytest.mark.long
def test_it_is_shown(calibrated: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundle_cli.main(["inspect", str(calibrated.path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert " in fp32, its step in int8-calibrated by scenes:1, but for transformer_blocks.5.*, exported from " in shown


@pytest.mark.long
def test_its_images(calibrated: Bundle, mini_bundle: Path) -> None:
    config = GenerateConfig(prompts=(TEXT,), height=64, width=64, steps=4, guidance_scale=3.0)
    settings = never_pruned(PruneSettings(num_clusters=6), 4)
    made = []
    for path in (mini_bundle, calibrated.path):
        image = generate(load_pipeline(path, "onnxruntime"), settings, config).images[0].tobytes()
        made.append(torch.frombuffer(bytearray(image), dtype=torch.uint8).float())
    assert 0 < (made[1] - made[0]).abs().mean() < 3  # of 255


@pytest.mark.long
def test_adapters_are_refused(calibrated: Bundle) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    adapter = {f"{name}.lora_A.weight": torch.ones(2, 192), f"{name}.lora_B.weight": torch.ones(192, 2)}
    with pytest.raises(EngineError, match="is in int8-calibrated, which no adapter can be added to"):
        load_pipeline(calibrated.path, "onnxruntime").load_lora_weights(adapter)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--quantize fp8", "--quantize fp8: its activations' scales are found on images, and no prompts are given; "),
        ("--calibrate scenes:2", "--calibrate: nothing is quantized; give --quantize int8 or fp8, or leave it out"),
        ("--unquantized proj_out", "--unquantized: nothing is quantized; "),
        ("--quantize int8 --calibrate scenes:0", "scenes:0: expected scenes:N with a whole number N from 1 to 5000"),
        ("--quantize int8 --calibrate nofile", "nofile cannot be read"),
        ("--quantize fp8 --calibrate scenes:257", "257 prompts, of each of which an image would be made; expected at "),
        ("--quantize int8 --calibrate \udcff", "argument --calibrate: '\\udcff': this is not UTF-8"),
        ("--quantize int8 --unquantized \udcff*", "argument --unquantized: '\\udcff*': this is not UTF-8"),
        ("--weights-only int4 --calibrate scenes:2", "--weights-only int4 --calibrate: it quantizes no activations; "),
        ("--quantize fp8 --calibrate scenes:2 --dtype fp16", "values leave fp16's range; give --dtype bf16 for plans"),
        ("--quantize fp8 --calibrate scenes:2 --random-weights", "sd3 has no text encoders, and so makes no images "),
        ("--quantize int8 --dtype bf16", "--quantize int8 --dtype bf16: what stays in floating point is computed in "),
        (
            "--quantize int8 --calibrate scenes:2 --refittable --target tensorrt_rtx",
            "--refittable: the step is in int8-calibrated, which no adapter can be added to; fuse the adapter with ",
        ),
    ],
)
def test_what_cannot_be_done_is_said_at_once(
    arguments: str, told: str, cat_export: CatExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cat_pruning.exporter.plans.plan_specs", lambda *given, **options: ())
    out = tmp_path / "bundle"
    code, printed, errors = cat_export("--model", "sd3", *arguments.split(), "--out", out)
    assert (code, printed, len(errors)) == (2, "", 1)
    assert told in errors[0]
    assert not out.exists()


def recorded(transformer: Any, directory: Path, batch: int = 2) -> Calibration:
    profile = ProfileSpec(
        name="p",
        height=64,
        width=64,
        prompts=1,
        batch=batch,
        latent_height=16,
        latent_width=16,
        num_tokens=64,
        num_kept=19,
        text_length=48,
    )
    family = family_of(transformer)
    return calibrate(transformer, directory, family, DType.FP32, [TEXT], profile, lambda done, total: None)


@pytest.mark.long
@pytest.mark.parametrize("weight", ["norm_out.linear", "transformer_blocks.0.ff.net.0.proj"])
def test_a_model_that_overflows(weight: str) -> None:
    transformer: Any = load_transformer(find_checkpoint("sd3-mini").source, DType.FP32)
    with torch.no_grad():
        transformer.get_submodule(weight).weight.fill_(float("inf"))
    with pytest.raises(EngineError, match=r"calibration: .* is given values that are not finite in fp32; give --dtype"):
        recorded(transformer, miniatures()["sd3-mini"])


@pytest.mark.parametrize("kind", ["sd3.5", "pixart-alpha", "flux-dev"])
def test_a_call_as_a_full_step(kind: str, make_tiny: Any, pipeline_call: Any) -> None:
    """Of more rows: the first of a call, then the second. Without a ControlNet its residuals add nothing."""
    transformer = make_tiny(kind)
    call = pipeline_call(transformer, batch=2, grid=(4, 5))
    family = call.family.with_residuals() if call.family.num_residuals else call.family
    dims, given = full_step(family, call.arguments, 6)
    step = StepModule(transformer, family)
    noise = run_step(step, example_inputs(step, dims) | given)["noise_out"]
    torch.testing.assert_close(noise, call.noise(transformer).repeat_interleave(3, 0))


def test_a_pipeline_that_fails(make_tiny: Any) -> None:
    """The miniature's text encoders are too narrow for it."""
    transformer = make_tiny("sd3")
    with pytest.raises(EngineError, match=r"calibration: StableDiffusion3Pipeline failed \(.*the checkpoint must make"):
        recorded(transformer, miniatures()["sd3-mini"])
    assert not any(module._forward_pre_hooks for module in transformer.modules())


def test_a_wrong_pattern_is_told_before_images_are_made(
    cat_export: CatExport, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("cat_pruning.exporter.export.calibrate")
    arguments = ("--quantize", "fp8", "--calibrate", "scenes:1", "--unquantized", "norm", "--target", "onnx")
    code, _, errors = cat_export("--model", tiny_checkpoint, *arguments, "--out", tmp_path / "bundle")
    assert (code, len(errors)) == (2, 1)
    assert "--unquantized norm: no layer that would be quantized is called so; layers are called as " in errors[0]


@pytest.mark.parametrize("options", [(), ("--verify",)])
def test_the_weights_are_held_once(
    options: tuple[str, ...],
    cat_export: CatExport,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For images and for --verify, which else reads what it writes; and the other parts' weights with them."""
    asked = []

    def check(weights: int, *, held_bytes: int, builds_plans: bool) -> None:
        asked.append(held_bytes)
        raise EngineError("enough")

    monkeypatch.setattr("cat_pruning.exporter.export.check_memory", check)
    arguments = ("--quantize", "int8", "--calibrate", "scenes:1", "--target", "onnx", *options)
    assert cat_export("--model", tiny_checkpoint, *arguments, "--out", tmp_path / "bundle")[0] == 2
    others = sum(path.stat().st_size for path in tiny_checkpoint.rglob("*") if path.is_file())
    transformer = sum(path.stat().st_size for path in tiny_checkpoint.glob("transformer/*.safetensors"))
    weights = 4 * find_checkpoint(str(tiny_checkpoint)).num_parameters
    assert weights < asked[0] <= weights + others - transformer


def test_a_pipeline_that_a_gpu_does_not_hold(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def to(pipe: Any, device: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StableDiffusion3Pipeline, "to", to)
    with pytest.raises(EngineError, match=r"not enough memory for images to calibrate by: CUDA out .*; free"):
        recorded(make_tiny("sd3"), miniatures()["sd3-mini"])


@pytest.mark.parametrize(("batch", "scale"), [(1, 1.0), (2, None)])
def test_guidance_is_the_profiles(
    batch: int, scale: float | None, make_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the pipeline's default, or none; and a module that a user is training is not, meanwhile."""
    given, training, transformer = [], [], make_tiny("sd3").train()
    transformer.transformer_blocks[0].eval()

    def call(pipe: Any, prompt: str, **arguments: Any) -> None:
        given.append(arguments.get("guidance_scale"))
        training.extend(module.training for module in pipe.transformer.modules())
        raise RuntimeError("enough")

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", call)
    with pytest.raises(EngineError, match="enough"):
        recorded(transformer, miniatures()["sd3-mini"], batch)
    assert given == [scale]
    assert not any(training)
    assert transformer.training
    assert not any(module.training for module in transformer.transformer_blocks[0].modules())
