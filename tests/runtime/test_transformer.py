"""`CatTransformer` as a module: its arguments, its refusals, and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import BundleError, CheckpointError, EngineError, SettingsError, ShapeError
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings

SETTINGS = PruneSettings(keep_ratio=0.4, full_steps=3, num_clusters=6)


def inputs(engine: StepEngine, size: tuple[int, int] = (16, 16), timestep: float = 1000.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = engine.family.config
    return {
        "hidden_states": torch.randn(2, config["in_channels"], *size, generator=generator),
        "timestep": torch.full((2,), timestep),
        "encoder_hidden_states": torch.randn(2, 48, config["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(2, config["pooled_projection_dim"], generator=generator),
    }


def test_an_unsupported_argument_is_named(engine: StepEngine) -> None:
    with pytest.raises(SettingsError, match=r"joint_attention_kwargs\[masks\]: not supported.*original transformer"):
        CatTransformer(engine, SETTINGS)(**inputs(engine), joint_attention_kwargs={"masks": [torch.ones(2)]})


def test_residuals_that_are_no_list_of_tensors(engine: StepEngine) -> None:
    for value in (torch.zeros(2, 64, 32), [None], "deep"):
        with pytest.raises(SettingsError, match="block_controlnet_hidden_states: expected a list of tensors, got"):
            CatTransformer(engine, SETTINGS)(**inputs(engine), block_controlnet_hidden_states=value)


def test_an_engine_without_residuals_refuses_a_control_net(engines: dict[str, StepEngine]) -> None:
    engine = engines["onnxruntime"]
    with pytest.raises(
        SettingsError, match=r"the graphs that onnxruntime runs take no ControlNet.*export .* --controlnet"
    ):
        CatTransformer(engine, SETTINGS)(**inputs(engine), block_controlnet_hidden_states=[torch.zeros(2, 64, 32)])


def test_it_is_a_model_of_diffusers(engine: StepEngine) -> None:
    class Named(CatTransformer):
        """A user's own."""

    for cls in (CatTransformer, Named):
        transformer = cls(engine, SETTINGS)
        assert isinstance(transformer, cls)
        assert isinstance(transformer, ModelMixin)
        assert type(transformer) is type(cls(engine)) is type(copy.deepcopy(transformer))
        assert type(transformer).__name__ == cls.__name__
        assert type(transformer).__module__ == cls.__module__
    assert not issubclass(CatTransformer, ModelMixin)  # until there is an instance, diffusers need not be imported


def test_absent_arguments_are_as_the_pipeline_passes_them(engine: StepEngine) -> None:
    absent = {"joint_attention_kwargs": None, "skip_layers": None, "block_controlnet_hidden_states": []}
    CatTransformer(engine, SETTINGS)(**inputs(engine), **absent)


@pytest.mark.parametrize("name", ["timestep", "encoder_hidden_states", "pooled_projections"])
def test_a_missing_argument_is_named(engine: StepEngine, name: str) -> None:
    arguments = inputs(engine)
    del arguments[name]
    with pytest.raises(SettingsError, match=f"{name}: expected a tensor, got NoneType"):
        CatTransformer(engine, SETTINGS)(**arguments)


def test_conditioning_by_position_is_refused(engine: StepEngine) -> None:
    """It must not be taken for `return_dict`."""
    arguments = inputs(engine)
    with pytest.raises(TypeError):
        CatTransformer(engine, SETTINGS)(arguments.pop("hidden_states"), arguments.pop("encoder_hidden_states"))


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((15, 16), "multiples of the patch size 2"),
        ((16, 0), "multiples of the patch size 2"),
        ((16, 50), "position table holds 48x48"),
        ((2, 4), "2 tokens, fewer than num_clusters=6"),
    ],
)
def test_sizes_that_the_model_cannot_take(engine: StepEngine, size: tuple[int, int], said: str) -> None:
    transformer = CatTransformer(engine, SETTINGS)
    with pytest.raises(ShapeError, match=said):
        transformer(**inputs(engine, size))
    transformer(**inputs(engine))  # and goes on


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("hidden_states", (2, 16, 16)),
        ("hidden_states", (2, 3, 16, 16)),
        ("encoder_hidden_states", (1, 48, 24)),
        ("encoder_hidden_states", (2, 48, 23)),
        ("pooled_projections", (2, 19)),
        ("timestep", (3,)),
    ],
)
def test_shapes_that_do_not_fit_each_other(engine: StepEngine, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=rf"{name}.*\({shape[0]}, "[:-2]):
        CatTransformer(engine, SETTINGS)(**inputs(engine) | {name: torch.zeros(shape)})


@pytest.mark.parametrize("shape", [(), (5,), (2, 48)])
def test_a_text_without_its_rows(engine: StepEngine, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"has shape \(.*\), expected \(batch, text rows, width\)"):
        CatTransformer(engine, SETTINGS)(**inputs(engine) | {"encoder_hidden_states": torch.zeros(shape)})


@pytest.mark.parametrize("name", ["hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda tensor: tensor.to("meta"), "it is on the meta device, which has no values"),
        (lambda tensor: tensor.to_sparse(), "expected a dense tensor, got a sparse_coo one; make it dense"),
        (lambda tensor: torch.nested.nested_tensor([*tensor]), "expected a dense tensor, got a nested one"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "it is of torch.float8_e4m3fn; convert it: float64, float32"),
        (lambda tensor: tensor.to(torch.complex64), "complex64"),
    ],
    ids=["meta", "sparse", "nested", "float8", "complex"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_tensors_that_no_step_computes_with(
    engines: dict[str, StepEngine], name: str, changed: Callable[[Tensor], Tensor], said: str
) -> None:
    engine = engines["onnxruntime"]
    arguments = inputs(engine)
    with pytest.raises(SettingsError, match=f"^{name}: .*{said}"):
        CatTransformer(engine, SETTINGS)(**arguments | {name: changed(arguments[name])})


def test_a_model_without_values(make_tiny_sd3: Callable[..., nn.Module]) -> None:
    """Wrapped or moved there; nor one in a format that nothing computes in."""
    model = make_tiny_sd3()
    model.proj_out.to("meta")
    with pytest.raises(CheckpointError, match=r"proj_out\.weight of the transformer is on the meta device"):
        CatTransformer.from_model(model)
    arguments = {"hidden_states": torch.ones(2, 4, 16, 16), "timestep": torch.full((2,), 500.0),
                 "encoder_hidden_states": torch.ones(2, 5, 24), "pooled_projections": torch.ones(2, 20)}  # fmt: skip
    for place, said in (("meta", "on the meta device"), (torch.float8_e4m3fn, "of torch.float8_e4m3fn")):
        wrapped = CatTransformer.from_model(make_tiny_sd3(), SETTINGS).to(place)
        with pytest.raises(EngineError, match=f"the transformer's weights are {said}"):
            wrapped(**arguments)


def test_a_model_of_fewer_blocks_than_its_config(make_tiny_sd3: Callable[..., nn.Module]) -> None:
    model: Any = make_tiny_sd3()
    del model.transformer_blocks[0]
    with pytest.raises(CheckpointError, match=r"has \d attention layers, its config makes \d"):
        CatTransformer.from_model(model)


@pytest.mark.parametrize("layers", [[2], [-1], [0, 99]])
def test_blocks_that_are_not_there_cannot_be_skipped(engine: StepEngine, layers: list[int]) -> None:
    transformer = CatTransformer(engine, SETTINGS)
    transformer(**inputs(engine))
    with pytest.raises(SettingsError, match=rf"skip_layers \[{layers[-1]}\]: the model has blocks 0 to 1"):
        transformer(**inputs(engine), skip_layers=layers)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *(
            ({"joint_attention_kwargs": {"scale": scale}}, "joint_attention_kwargs: scale=.*: expected a finite number")
            for scale in ("x", "0.5", None, [1.0], float("nan"), 10**400, torch.ones(2))
        ),
        ({"skip_layers": [True]}, r"skip_layers: expected a list of blocks, got \[True\]"),
        ({"context": []}, r"context=\[\]: expected a name"),
    ],
)
def test_arguments_of_another_kind_are_named(engine: StepEngine, arguments: dict[str, Any], says: str) -> None:
    with CatTransformer(engine, SETTINGS).image() as image, pytest.raises(SettingsError, match=says):
        image(**inputs(engine), **arguments)


def test_a_cache_context_ends_with_an_error(engine: StepEngine) -> None:
    """Or the next image would be taken for a call on the side."""
    transformer = CatTransformer(engine, SETTINGS)
    with pytest.raises(ShapeError), transformer.cache_context("uncond"):
        transformer(**inputs(engine, (15, 16)))
    assert transformer.last_step is None
    transformer(**inputs(engine))
    assert transformer.last_step is not None


def test_results_as_diffusers_returns_them(engine: StepEngine) -> None:
    arguments = inputs(engine)
    transformer = CatTransformer(engine, SETTINGS)
    as_object = transformer(**arguments).sample
    (as_tuple,) = transformer(**arguments, return_dict=False)
    assert as_object.shape == arguments["hidden_states"].shape
    assert torch.equal(as_object, as_tuple)
    half = transformer(**{name: tensor.half() for name, tensor in arguments.items()}).sample
    assert half.dtype == torch.float16


def test_a_scalar_timestep(engine: StepEngine) -> None:
    arguments = inputs(engine)
    expected = CatTransformer(engine, SETTINGS)(**arguments).sample
    actual = CatTransformer(engine, SETTINGS)(**arguments | {"timestep": torch.tensor(1000.0)}).sample
    assert torch.equal(actual, expected)


def test_the_given_transformer_is_not_changed(make_tiny_sd3: Callable[..., nn.Module]) -> None:
    model = make_tiny_sd3()
    before = copy.deepcopy(model)
    arguments = {
        "hidden_states": torch.ones(2, 4, 16, 16),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": torch.ones(2, 5, 24),
        "pooled_projections": torch.ones(2, 20),
    }
    wrapped = CatTransformer.from_model(model, SETTINGS)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**arguments).sample, before(**arguments).sample, rtol=0, atol=1e-5)
        assert torch.equal(model(**arguments).sample, before(**arguments).sample)
    for mine, original in zip(model.modules(), before.modules(), strict=True):
        assert type(mine) is type(original)
        assert mine.training == original.training
        assert not mine._forward_hooks
        assert not mine._forward_pre_hooks
        assert type(getattr(mine, "processor", None)) is type(getattr(original, "processor", None))
    for (name, mine), (_, original) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(mine, original), name
        assert mine.requires_grad == original.requires_grad, name
    assert list(model.state_dict()) == list(before.state_dict())


def test_weights_changed_in_place_are_seen(make_tiny_sd3: Callable[..., nn.Module]) -> None:
    """The weights are shared, not copied."""
    model = make_tiny_sd3()
    wrapped = CatTransformer.from_model(model, SETTINGS)
    arguments = {
        "hidden_states": torch.ones(2, 4, 16, 16),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": torch.ones(2, 5, 24),
        "pooled_projections": torch.ones(2, 20),
    }
    first = wrapped(**arguments).sample
    with torch.no_grad():
        model.proj_out.weight.mul_(2)
    wrapped.reset()
    assert not torch.allclose(wrapped(**arguments).sample, first)


def test_a_model_that_moves_to_another_dtype(make_tiny_sd3: Callable[..., nn.Module]) -> None:
    wrapped = CatTransformer.from_model(make_tiny_sd3(), SETTINGS)
    arguments = {
        "hidden_states": torch.ones(2, 4, 16, 16),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": torch.ones(2, 5, 24),
        "pooled_projections": torch.ones(2, 20),
    }
    first = wrapped(**arguments).sample
    wrapped.to(torch.bfloat16)
    assert wrapped.dtype == torch.bfloat16
    wrapped.reset()
    moved = wrapped(**arguments).sample
    torch.testing.assert_close(moved, first, rtol=0.1, atol=0.1)
    assert torch.equal(moved, CatTransformer.from_model(wrapped.engine.transformer, SETTINGS)(**arguments).sample)


def test_a_model_of_no_supported_class() -> None:
    with pytest.raises(CheckpointError, match="Linear"):
        CatTransformer.from_model(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="takes none of timestep"):
        CatTransformer.from_model(type("NotPythons", (nn.Module,), {"forward": min})())


def test_a_copy_has_an_image_of_its_own(engine: StepEngine) -> None:
    original = CatTransformer(engine, SETTINGS)
    original(**inputs(engine))
    other = copy.deepcopy(original)
    assert other.engine is original.engine
    assert other.settings == original.settings
    assert other.last_step is None
    other(**inputs(engine, timestep=900.0))
    assert original.last_step is not None
    assert original.last_step.timestep == 1000.0


def test_from_bundle(mini_bundle: Path) -> None:
    transformer = CatTransformer.from_bundle(mini_bundle)
    assert transformer.engine.name == "onnxruntime"
    assert transformer.settings == PruneSettings()
    assert "engine=onnxruntime" in repr(transformer)
    assert transformer.config.in_channels == 4
    torch_engine = CatTransformer.from_bundle(mini_bundle, "torch", compiled=True).engine
    assert isinstance(torch_engine, TorchStepEngine)
    assert torch_engine.compiled
    with pytest.raises(EngineError, match="no use for the engine onnxruntime; leave it out, or take torch"):
        CatTransformer.from_bundle(mini_bundle, compiled=True)
    assert CatTransformer.from_bundle(mini_bundle, settings=SETTINGS).settings == SETTINGS
    with pytest.raises(
        EngineError, match="'nonsense' is not known; known are auto, tensorrt, tensorrt_rtx, onnxruntime, torch"
    ):
        CatTransformer.from_bundle(mini_bundle, "nonsense")
    with pytest.raises(BundleError, match="does not exist"):
        CatTransformer.from_bundle(mini_bundle / "nowhere")


def test_an_adapter_that_comes_and_goes_between_images(make_tiny_sd3: Callable[..., Any]) -> None:
    """The engine's copy of the module is made for an image, and sees what was done to the user's until then."""
    module = make_tiny_sd3()
    transformer = CatTransformer.from_model(module, SETTINGS)
    call = inputs(transformer.engine)

    def image() -> Tensor:
        with torch.no_grad():
            expected: Tensor = module(**call, return_dict=False)[0]
        transformer.reset()
        assert torch.equal(transformer(**call).sample, expected)
        return expected

    plain = image()
    module.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    adapted = image()
    assert not torch.equal(adapted, plain)
    module.set_adapters(["default"], [0.2])
    assert not torch.equal(image(), adapted)
    module.disable_adapters()
    assert torch.equal(image(), plain)
