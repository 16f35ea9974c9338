"""What each family says of its transformers, against the transformers themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    PAGCFGJointAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor

from cat_pruning import families
from cat_pruning.errors import CheckpointError, SettingsError, ShapeError
from cat_pruning.exporter.step_graph import run_step
from cat_pruning.families import FAMILIES, family_class_named, family_named, family_of, family_of_class
from cat_pruning.families.interception import StepModule
from cat_pruning.step_io import SYMBOLIC, Part, StepDims


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_noise_tokens_are_the_rows_of_the_output_projection(
    tiny_transformer: Any, pipeline_call: Any, grid: tuple[int, int]
) -> None:
    call, rows = pipeline_call(tiny_transformer, batch=3, grid=grid), []
    tiny_transformer.proj_out.register_forward_hook(lambda module, args, output: rows.append(output))
    noise = call.noise(tiny_transformer)
    assert torch.equal(call.family.noise_tokens(noise), rows[0])


def test_predicted_noise_of_pixart_is_the_mean_without_the_variance(tiny_pixart: Any, pipeline_call: Any) -> None:
    call = pipeline_call(tiny_pixart, batch=2, grid=(3, 5))
    noise = call.noise(tiny_pixart)
    mean = noise.chunk(2, dim=1)[0]  # as PixArtSigmaPipeline does
    tokens = call.family.predicted_noise(noise)
    assert tokens.shape == (2, 15, 2 * 2 * 4)
    assert torch.equal(tokens, call.family.noise_tokens(mean))


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_predicted_noise_of_the_others_is_all_of_it(make_tiny: Any, pipeline_call: Any, kind: str) -> None:
    transformer = make_tiny(kind)
    call = pipeline_call(transformer, batch=2, grid=(3, 5))
    noise = call.noise(transformer)
    assert torch.equal(call.family.predicted_noise(noise), call.family.noise_tokens(noise))


# ------------------------------------------------------------------ inputs


def test_shapes_are_those_of_a_pipelines_call(tiny_transformer: Any, pipeline_call: Any) -> None:
    call = pipeline_call(tiny_transformer, batch=3, grid=(3, 5), text=6)
    dims = call.family.dims((3, 5), batch=3, text_length=6, num_kept=4)
    assert dims == StepDims.of(batch=3, latent_height=6, latent_width=10, patch_size=2, text_length=6, num_kept=4)
    shapes = call.family.input_shapes(dims)
    inputs = call.inputs()
    assert {name: tuple(tensor.shape) for name, tensor in inputs.items()} == shapes
    assert list(shapes)[:2] == ["hidden_states", "timestep"]
    assert tuple(call.noise(tiny_transformer).shape) == call.family.noise_shape(dims)


def test_no_input_of_the_timesteps_has_a_dimension_of_image_or_text(tiny_transformer: Any) -> None:
    family = family_of(tiny_transformer)
    shapes = family.input_shapes(SYMBOLIC)
    for name in family.timestep_inputs:
        assert {dim for dim in shapes.get(name, ()) if isinstance(dim, str)} <= {"batch"}
    assert family.part_of("timestep") is Part.TIMESTEP
    assert family.part_of("encoder_hidden_states") is Part.PROMPT
    assert {family.part_of(name) for name in ("hidden_states", "noise", "keep_indices", "key_cache_0")} == {Part.STEP}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_timesteps_and_positions_stay_fp32(tiny_transformer: Any, pipeline_call: Any, dtype: torch.dtype) -> None:
    inputs = pipeline_call(tiny_transformer.to(dtype), batch=1, grid=(3, 5)).inputs()
    fp32 = {"timestep", "guidance", "position", "rotary_cos", "rotary_sin"}
    for name, tensor in inputs.items():
        assert tensor.dtype is (torch.float32 if name in fp32 else dtype), name


def test_flux_takes_ids_with_a_batch_as_older_pipelines_pass_them(tiny_flux: Any, pipeline_call: Any) -> None:
    call = pipeline_call(tiny_flux, batch=2, grid=(3, 5))
    ids = {name: call.arguments[name].expand(2, -1, -1) for name in ("img_ids", "txt_ids")}
    older = type(call)(call.family, call.arguments | ids)
    assert call.family.grid(call.arguments["hidden_states"], ids) == (3, 5)
    for name, tensor in call.inputs().items():
        assert torch.equal(older.inputs()[name], tensor)


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("sd3", (1, 4, 5, 8), r"latents of 5x8: both sides must be multiples of the patch size 2"),
        ("sd3", (1, 4, 0, 8), r"latents of 0x8: both sides must be multiples"),
        ("sd3", (1, 4, 8, 50), r"latents of 8x50: the model's position table holds 48x48 at most"),
        ("sd3", (1, 16, 4), r"expected latents \(B, C, H, W\), got shape \(1, 16, 4\)"),
        ("pixart", (1, 4, 8, 7), r"latents of 8x7: both sides must be multiples of the patch size 2"),
        ("flux-dev", (1, 16, 16), r"expected packed latents \(B, N, C\) .* img_ids of 3 rows and 5 columns"),
        ("flux-dev", (1, 16, 3, 5), r"expected packed latents \(B, N, C\)"),
    ],
)
def test_latents_that_do_not_fit(
    make_tiny: Any, pipeline_call: Any, kind: str, shape: tuple[int, ...], message: str
) -> None:
    transformer = make_tiny(kind)
    call = pipeline_call(transformer, batch=1, grid=(3, 5))
    with pytest.raises(ShapeError, match=message):
        call.family.grid(torch.zeros(shape), call.arguments)


def ids(number: int, rows: int, columns: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.tensor([float(number)]), torch.arange(float(rows)), torch.arange(float(columns)))


def test_flux_reference_images_follow_the_image(tiny_flux: Any) -> None:
    """As FLUX.1 Kontext's pipelines number them; the first two are of one image of 2 x 5 tokens."""
    family = family_of(tiny_flux)
    alone, with_one, with_two = (
        {"img_ids": torch.cat([ids(number, *size) for number, size in images])}
        for images in (
            [(0, (2, 5))],
            [(0, (2, 5)), (1, (3, 4))],
            [(0, (2, 5)), (1, (3, 4)), (2, (2, 5))],
        )
    )
    for arguments, references in ((alone, 0), (with_one, 12), (with_two, 22)):
        assert family.grid(torch.zeros(1, 10 + references, 16), arguments) == (2, 5)
        assert family.num_references(arguments) == references
        with pytest.raises(ShapeError, match="expected packed latents"):
            family.grid(torch.zeros(1, 11 + references, 16), arguments)


@pytest.mark.parametrize("numbers", [(1, 2), (1, 0), (0, 1, 0)])
def test_flux_several_images_at_once(tiny_flux: Any, numbers: tuple[int, ...]) -> None:
    """As VisualCloze's pipelines make them: all are read, and none is a reference."""
    arguments = {"img_ids": torch.cat([ids(number, 1, 5) for number in numbers])}
    with pytest.raises(ShapeError, match=r"as VisualCloze's pipelines make at once.*original transformer"):
        family_of(tiny_flux).grid(torch.zeros(1, 5 * len(numbers), 16), arguments)


PROCESSORS = {
    "sd3": ("an IP-adapter", lambda: SD3IPAdapterJointAttnProcessor2_0(32, 24, 8)),
    "sd3.5": ("perturbed-attention guidance", PAGCFGJointAttnProcessor2_0),
    "flux-dev": ("an IP-adapter", lambda: FluxIPAdapterAttnProcessor(32, 24)),
    "pixart": ("perturbed-attention guidance", PAGIdentitySelfAttnProcessor2_0),
    "pixart-alpha": ("a processor of your own", type("RegionalAttnProcessor", (AttnProcessor2_0,), {})),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_processor_that_changes_attention_is_refused_by_name(make_tiny: Any, kind: str) -> None:
    what, processor = PROCESSORS[kind]
    transformer = make_tiny(kind)
    block = transformer.transformer_blocks[0]
    (block.attn2 if kind == "pixart-alpha" else getattr(block, "attn1", None) or block.attn).processor = processor()
    with pytest.raises(SettingsError, match=rf"AttnProcessor\w*: {what} changes what attention computes"):
        StepModule(transformer, family_of(transformer))


def test_flux_text_ids_that_do_not_fit(tiny_flux: Any, pipeline_call: Any) -> None:
    call = pipeline_call(tiny_flux, batch=1, grid=(3, 5))
    call.arguments["txt_ids"] = torch.zeros(5, 3)
    with pytest.raises(ShapeError, match="txt_ids has 5 rows, expected 7 as encoder_hidden_states"):
        call.inputs()


def test_pixart_has_no_largest_size(tiny_pixart: Any) -> None:
    assert family_of(tiny_pixart).grid(torch.zeros(1, 4, 512, 2), {}) == (256, 1)


# ------------------------------------------------------------------ skip-layer guidance


def noise_without(transformer: Any, call: Any, step_inputs: Any, layers: tuple[int, ...]) -> Tensor:
    step, inputs = StepModule(transformer, call.family), call.inputs()
    conditioning = {name: inputs[name] for name in inputs if name not in ("hidden_states", "timestep")}
    gated = call.family.without_layers(conditioning, layers)
    assert torch.equal(conditioning["layer_gates"], torch.ones(3))  # the other calls of the image need it
    return run_step(step, step_inputs(step, batch=2, grid=(3, 5)) | inputs | gated)["noise_out"]


@pytest.mark.parametrize("layers", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("kind", ["sd3", "sd3.5"])
def test_skipped_layers_are_diffusers_own_to_the_bit(
    make_tiny: Any, pipeline_call: Any, step_inputs: Any, kind: str, layers: tuple[int, ...]
) -> None:
    transformer = make_tiny(kind, num_layers=3)
    call = pipeline_call(transformer, batch=2, grid=(3, 5))
    expected = call.noise(transformer, skip_layers=list(layers))
    assert torch.equal(noise_without(transformer, call, step_inputs, layers), expected)
    assert torch.equal(expected, call.noise(transformer)) == (layers == ())


@pytest.mark.parametrize("layers", [(3,), (0, -1)])
def test_layers_that_the_model_does_not_have(make_tiny: Any, pipeline_call: Any, layers: tuple[int, ...]) -> None:
    call = pipeline_call(make_tiny("sd3", num_layers=3), batch=1, grid=(3, 5))
    with pytest.raises(SettingsError, match=rf"skip_layers \[{layers[-1]}\]: the model has blocks 0 to 2"):
        call.family.without_layers(call.inputs(), layers)


@pytest.mark.parametrize("kind", ["pixart", "flux-dev"])
def test_families_without_skip_layer_guidance(tiny_transformer: Any) -> None:
    family = family_of(tiny_transformer)
    with pytest.raises(SettingsError, match=rf"skip_layers=\[1\]: {family.transformer_class} has no skip-layer"):
        family.without_layers({}, (1,))


# ------------------------------------------------------------------ names


def test_families_are_found_by_name_and_class() -> None:
    assert [family.name for family in FAMILIES] == ["sd3", "pixart", "flux"]
    for family in FAMILIES:
        assert family_class_named(family.name) is family_of_class(family.transformer_class) is family


def test_what_is_no_family() -> None:
    with pytest.raises(CheckpointError, match=r"'dit' is not known to this .*; known are sd3, pixart, flux"):
        family_named("dit", {})
    known = "SD3Transformer2DModel, PixArtTransformer2DModel, FluxTransformer2DModel"
    with pytest.raises(CheckpointError, match=rf"class DiTTransformer2DModel is not supported; supported are {known}"):
        family_of_class("DiTTransformer2DModel")


def test_a_family_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", [*FAMILIES])

    @families.register
    class Own(families.StableDiffusion3):
        name = "own"
        transformer_class = "OwnTransformer2DModel"

    assert family_of_class("OwnTransformer2DModel") is Own
    again = families.register(type("Own", Own.__bases__, {**vars(Own), "__qualname__": Own.__qualname__}))
    assert family_of_class("OwnTransformer2DModel") is again
    families.register(Own)
    assert family_class_named("own") is Own
    for taken in ({"name": "own"}, {"name": "other", "transformer_class": "FluxTransformer2DModel"}):
        with pytest.raises(SettingsError, match=r"the name or the class is (Own|Flux)'s; choose another name"):
            families.register(type("Another", (Own,), taken))
    assert len(families.FAMILIES) == 4
