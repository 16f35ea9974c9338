"""Adapters: fused by `--lora`, fused by the user, and loaded into a module; always in the exported weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import torch
from diffusers import FluxPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from cat_pruning.bundle.schema import Source
from cat_pruning.checkpoints.checkpoint import load_transformer
from cat_pruning.checkpoints.lora import fuse_loras, parse_lora
from cat_pruning.dtype import DType
from cat_pruning.errors import CatError, CheckpointError, SettingsError
from cat_pruning.exporter.export import ExportConfig, export
from cat_pruning.exporter.step_graph import example_inputs, run_step
from cat_pruning.exporter.verify import run_graphs
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.names import Target

TARGETS = ["to_q", "to_k", "add_v_proj", "norm1.linear"]  # the last one is in timestep.onnx
SCALE = 0.7
ALPHA = 8.0  # alpha / r, where an adapter has one


def adapter(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """A random adapter of rank 2 for `model`, as diffusers' training scripts save it: A and B by module name."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(name.endswith(target) for target in TARGETS):
            weights[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
            weights[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator)
    return weights


def with_adapter(model: Any, weights: dict[str, Tensor], scale: float) -> Any:
    """The reference, by hand: W + scale · B A."""
    with torch.no_grad():
        for name, a in weights.items():
            if name.endswith("lora_A.weight"):
                module = model.get_submodule(name.removeprefix("transformer.").removesuffix(".lora_A.weight"))
                module.weight += scale * weights[name.replace("lora_A", "lora_B")] @ a
    return model


@pytest.fixture(scope="module")
def base(make_tiny_sd3: Callable[..., SD3Transformer2DModel]) -> Callable[[], SD3Transformer2DModel]:
    return lambda: make_tiny_sd3(num_layers=2)


@pytest.fixture
def lora_file(base: Callable[[], Any], tmp_path: Path) -> Path:
    path = tmp_path / "style.safetensors"
    save_file(adapter(base()), path, metadata={"format": "pt"})
    return path


@pytest.fixture
def lora_directory(base: Callable[[], Any], tmp_path: Path) -> Path:
    """The same adapter as PEFT writes it, for classes that diffusers loads no LoRA files for."""
    model = peft.get_peft_model(base(), peft.LoraConfig(r=2, lora_alpha=2 * ALPHA, target_modules=TARGETS))
    state = {f"base_model.model.{k.removeprefix('transformer.')}": v for k, v in adapter(base()).items()}
    peft.set_peft_model_state_dict(model, state)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def outputs_of(bundle: Path, reference: Any) -> tuple[Tensor, Tensor]:
    """The noise of one pruned step: from the bundle's graphs, and from the reference module."""
    family = family_of(reference)
    step = StepModule(reference, family)
    dims = family.dims((5, 6), batch=2, text_length=7, num_kept=9)
    inputs = example_inputs(step, dims)
    sessions = [onnxruntime.InferenceSession(bundle / f"{part}.onnx") for part in ("prompt", "timestep", "step")]
    results = run_graphs(sessions, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(results["noise_out"]), run_step(step, inputs)["noise_out"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_fused_adapter_is_in_the_exported_weights(
    kind: str, request: pytest.FixtureRequest, base: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = request.getfixturevalue(f"lora_{kind}")
    lora = parse_lora(f"{path}:{SCALE}")
    bundle = export(
        ExportConfig(model=str(tiny_checkpoint), out=tmp_path / "out", loras=(lora,), targets=(Target.ONNX,))
    )
    reference = with_adapter(base(), adapter(base()), SCALE * (ALPHA if kind == "directory" else 1.0))
    got, expected = outputs_of(bundle.path, reference)
    without = outputs_of(bundle.path, base())[1]
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (without - expected).abs().max() > 0.05 * expected.abs().max()  # or the adapter would not matter
    assert bundle.manifest.source.loras == (lora,)
    assert f"--lora {path}:{SCALE}" in bundle.export_command()
    # The torch engine of the bundle has them too.
    loaded: Any = load_transformer(bundle.manifest.source, DType.FP32)
    weight = loaded.transformer_blocks[0].attn.to_q.weight
    torch.testing.assert_close(weight, reference.transformer_blocks[0].attn.to_q.weight)


@pytest.mark.long
def test_an_adapter_that_is_loaded_but_not_fused_is_exported_with_its_module(
    make_tiny_sd3: Callable[..., Any], write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Of one layer: its graph is no other test's."""
    adapted, plain = make_tiny_sd3(num_layers=1), make_tiny_sd3(num_layers=1)
    weights = adapter(plain)
    save_file(weights, tmp_path / "style.safetensors", metadata={"format": "pt"})
    adapted.load_lora_adapter(str(tmp_path), weight_name="style.safetensors", prefix="transformer")
    checkpoint = write_checkpoint(tmp_path / "pipeline", num_layers=1)
    config = ExportConfig(model=str(checkpoint), out=tmp_path / "out", targets=(Target.ONNX,))
    bundle = export(config, transformer=adapted)
    got, expected = outputs_of(bundle.path, with_adapter(plain, weights, 1.0))
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert any(isinstance(module, peft.tuners.lora.LoraLayer) for module in adapted.modules())  # still the user's own
    assert bundle.manifest.source.in_memory
    with pytest.raises(CheckpointError, match="a module in memory"):
        load_transformer(bundle.manifest.source, DType.FP32)


def test_weights_that_another_library_quantized_are_not_exported(
    base: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    transformer = base()
    layer = transformer.transformer_blocks[0].attn.to_q
    layer.weight = torch.nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data))  # made of others, as torchao's
    config = ExportConfig(model=str(tiny_checkpoint), out=tmp_path / "out", targets=(Target.ONNX,))
    told = r"attn\.to_q\.weight is a TwoTensor, not an ordinary tensor; .* --quantize quantizes the step"
    with pytest.raises(SettingsError, match=told):
        export(config, transformer=transformer)


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
@pytest.mark.parametrize("says", ["metadata", "alpha keys", "names without a prefix"])
def test_alpha_counts_however_a_file_says_it(make_tiny: Any, tmp_path: Path, kind: str, says: str) -> None:
    model, weights = make_tiny(kind), adapter(make_tiny(kind))
    path = tmp_path / "style.safetensors"
    if says == "metadata":
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2 * ALPHA, target_modules=TARGETS))
        peft.set_peft_model_state_dict(model, {k.removeprefix("transformer."): v for k, v in weights.items()})
        pipeline = FluxPipeline if kind.startswith("flux") else StableDiffusion3Pipeline
        metadata = {"transformer_lora_adapter_metadata": model.peft_config["default"].to_dict()}
        layers = peft.get_peft_model_state_dict(model)
        pipeline.save_lora_weights(tmp_path, layers, weight_name=path.name, **metadata)
        model = make_tiny(kind)
    else:
        modules = {name.partition(".lora_")[0] for name in weights}
        file = weights | {f"{name}.alpha": torch.tensor(2 * ALPHA) for name in modules}
        prefix = "" if says == "alpha keys" else "transformer."
        save_file({name.removeprefix(prefix): weight for name, weight in file.items()}, path)
    fused: Any = fuse_loras(model, (parse_lora(f"{path}:{SCALE}"),))
    expected = with_adapter(make_tiny(kind), weights, SCALE * ALPHA)
    for (name, got), reference in zip(fused.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, reference, msg=lambda m, name=name: f"{name}: {m}")


def test_an_adapter_of_kohya_for_flux(make_tiny: Any, tmp_path: Path) -> None:
    model, expected = make_tiny("flux-dev"), make_tiny("flux-dev")
    generator = torch.Generator().manual_seed(0)
    width = model.inner_dim
    down, up = torch.randn(2, 4 * width, generator=generator), torch.randn(width, 2, generator=generator)
    name = "lora_unet_double_blocks_0_img_mlp_2"
    path = tmp_path / "kohya.safetensors"
    layers = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(16.0)}
    save_file({f"{name}.{part}": value for part, value in layers.items()}, path)
    fused: Any = fuse_loras(model, (parse_lora(str(path)),))
    expected.transformer_blocks[0].ff.net[2].weight.data += 16.0 / 2 * up @ down
    got = fused.transformer_blocks[0].ff.net[2].weight
    torch.testing.assert_close(got, expected.transformer_blocks[0].ff.net[2].weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": (2, 32)}, r"transformer_blocks\.7\.attn\.to_q.* "
         r"belongs to no module"),
        ({"lora_unet_double_blocks_0_img_mlp_2.lora_down.weight": (2, 32)}, "belongs to no module"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "nan"}, "is not finite"),
        ({"": "nothing"}, "no weights for the transformer"),
    ],
)  # fmt: skip
def test_an_adapter_that_fits_in_part_is_refused(
    base: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    weights = adapter(base())
    for name, shape in change.items():
        if shape == "nothing":
            weights = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}
        else:
            weights[name] = torch.full((2, 32), float("nan")) if shape == "nan" else torch.ones(shape)
    path = tmp_path / "bad.safetensors"
    save_file(weights, path)
    model = base()
    with pytest.raises(CheckpointError, match=rf"--lora {path} cannot be fused .*{message}"):
        fuse_loras(model, (parse_lora(str(path)),))
    for got, before in zip(model.parameters(), base().parameters(), strict=True):
        assert torch.equal(got, before)


def test_weights_of_text_encoders_are_told(base: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "both.safetensors"
    save_file(adapter(base()) | {"text_encoder.text_model.x.lora_A.weight": torch.ones(2, 4)}, path)
    fused = fuse_loras(base(), (parse_lora(str(path)),))
    expected = with_adapter(base(), adapter(base()), 1.0)
    assert torch.equal(fused.transformer_blocks[0].attn.to_q.weight, expected.transformer_blocks[0].attn.to_q.weight)
    assert "what it has for text_encoder is not exported" in caplog.text


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_a_scale_must_be_finite(scale: str) -> None:
    with pytest.raises(SettingsError, match="finite scale"):
        parse_lora(f"a.safetensors:{scale}")


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [("a.safetensors", "a.safetensors", 1.0), ("a:0.5", "a", 0.5), ("c:/a", "c:/a", 1.0), ("b:1e-1", "b", 0.1)],
)
def test_an_adapter_on_the_command_line(text: str, path: str, scale: float) -> None:
    lora = parse_lora(text)
    assert (lora.path, lora.scale) == (str(Path(path).resolve()), scale)


def test_an_adapter_of_another_model_is_refused(
    make_tiny_sd3: Any, tiny_checkpoint: Path, tmp_path: Path, cat_export: Any
) -> None:
    other = make_tiny_sd3(num_attention_heads=2, caption_projection_dim=16)
    path = tmp_path / "other.safetensors"
    save_file(adapter(other), path)
    for bad in (path, tmp_path / "missing.safetensors", tiny_checkpoint / "model_index.json"):
        code, _, errors = cat_export("--model", tiny_checkpoint, "--out", tmp_path / "out", "--lora", bad)
        assert code == 2
        assert len(errors) == 1
        assert f"--lora {bad} cannot be fused" in errors[0]
        assert not (tmp_path / "out").exists()


def test_a_module_must_be_of_the_checkpoint(base: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = ExportConfig(model=str(tiny_checkpoint), out=tmp_path / "out", targets=(Target.ONNX,))
    with pytest.raises(CheckpointError, match="a Linear"):
        export(config, transformer=torch.nn.Linear(2, 2))
    with pytest.raises(SettingsError, match=r"the transformer is on meta; .* transformer\.to\('cpu'\)"):
        export(config, transformer=base().to("meta"))
    with pytest.raises(SettingsError, match="bfloat16"):
        export(config, transformer=base().bfloat16())
    damaged = base()
    damaged.proj_out.bias.data[1] = torch.nan
    with pytest.raises(CheckpointError, match=r"the transformer: proj_out\.bias has values that are not finite"):
        export(config, transformer=damaged)
    with pytest.raises(CatError, match="says nothing about random weights"):
        export(
            ExportConfig(model="sd3", out=tmp_path / "out", random_weights=True, loras=(parse_lora("a"),)),
        )
    assert Source(kind="packaged", location="sd3-mini").loras == ()


@pytest.mark.parametrize(
    ("gone", "message"),
    [("lora_A", r"lora_B\.weight has no lora_A\.weight"), ("lora_B", r"lora_A\.weight has no lora_B\.weight")],
)
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_half_an_adapter_is_refused(
    base: Any, request: pytest.FixtureRequest, kind: str, gone: str, message: str
) -> None:
    path = request.getfixturevalue(f"lora_{kind}")
    file = path if kind == "file" else path / "adapter_model.safetensors"
    weights = load_file(file)
    del weights[next(name for name in weights if gone in name)]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"--lora {path} cannot be fused .*{message}"):
        fuse_loras(base(), (parse_lora(str(path)),))


@pytest.mark.parametrize(("scale", "alpha"), [("1e38", ALPHA), ("1", 1e38), ("1", float("nan"))])
@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_scale_that_overflows_is_refused(
    base: Any, request: pytest.FixtureRequest, kind: str, dtype: torch.dtype, scale: str, alpha: float
) -> None:
    path = request.getfixturevalue(f"lora_{kind}")
    if kind == "directory":
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
    else:
        weights = load_file(path)
        alphas = {f"{name.partition('.lora_')[0]}.alpha": torch.tensor(alpha) for name in weights}
        save_file(weights | alphas, path, metadata={"format": "pt"})
    message = rf"--lora {path} cannot be fused .*at this scale it makes transformer_blocks\S*weight overflow {dtype}"
    with pytest.raises(CheckpointError, match=message):
        fuse_loras(base().to(dtype), (parse_lora(f"{path}:{scale}"),))


@pytest.mark.parametrize("init", [True, False])  # of what PEFT fills in: no change, or a random one
def test_a_layer_that_is_configured_and_has_no_weights_is_refused(base: Any, lora_directory: Path, init: bool) -> None:
    config = json.loads((lora_directory / "adapter_config.json").read_text())
    changed = {"target_modules": [*TARGETS, "proj_out"], "init_lora_weights": init}
    (lora_directory / "adapter_config.json").write_text(json.dumps(config | changed))
    with pytest.raises(CheckpointError, match=r"its configuration names proj_out, for which it has no weights"):
        fuse_loras(base(), (parse_lora(str(lora_directory)),))


def test_pickled_weights_are_refused_in_words(base: Any, lora_directory: Path) -> None:
    torch.save(load_file(lora_directory / "adapter_model.safetensors"), lora_directory / "adapter_model.bin")
    (lora_directory / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors; it has pickled weights, which can"):
        fuse_loras(base(), (parse_lora(str(lora_directory)),))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 32), r"has rank 3, its other half 2"), ((2,), r"has shape \(2,\), of a weight of \(32, 32\)")],
)
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_halves_that_do_not_fit_each_other_are_told(
    base: Any, request: pytest.FixtureRequest, kind: str, shape: tuple[int, ...], message: str
) -> None:
    path = request.getfixturevalue(f"lora_{kind}")
    file = path if kind == "file" else path / "adapter_model.safetensors"
    weights = load_file(file)
    weights[next(name for name in weights if "to_q.lora_A" in name)] = torch.ones(shape)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"--lora {path} cannot be fused .*{message}"):
        fuse_loras(base(), (parse_lora(str(path)),))


def test_what_a_conversion_cannot_place_is_named(make_tiny: Any, tmp_path: Path) -> None:
    path, block = tmp_path / "kohya.safetensors", "lora_unet_double_blocks_0"
    weights = {
        f"{block}_img_mlp_2.lora_down.weight": torch.ones(2, 128),
        f"{block}_img_mlp_2.lora_up.weight": torch.ones(32, 2),
        f"{block}_of_the_future.lora_down.weight": torch.ones(2, 32),
    }
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"Incompatible keys detected: lora_unet_double_blocks_0_of_the_future"):
        fuse_loras(make_tiny("flux-dev"), (parse_lora(str(path)),))


def test_a_directory_for_another_model_is_refused(make_tiny_sd3: Any, lora_directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\..* belongs to no module of the model"):
        fuse_loras(make_tiny_sd3(num_layers=1), (parse_lora(str(lora_directory)),))


def test_shapes_of_another_model_are_told(make_tiny_sd3: Any, lora_file: Path) -> None:
    other = make_tiny_sd3(num_attention_heads=2, caption_projection_dim=16)
    with pytest.raises(CheckpointError, match=r"has shape \(\d+, \d+\), of a weight of \(\d+, 16\)"):
        fuse_loras(other, (parse_lora(str(lora_file)),))


def test_what_diffusers_would_leave_out_of_a_dora_is_told(base: Any, tmp_path: Path) -> None:
    weights = adapter(base())
    name = next(iter(weights)).removesuffix(".lora_A.weight")
    path = tmp_path / "dora.safetensors"
    save_file(weights | {f"{name}.dora_scale": torch.ones(32)}, path)
    with pytest.raises(CheckpointError, match=r"dora_scale, which diffusers leaves out"):
        fuse_loras(base(), (parse_lora(str(path)),))
