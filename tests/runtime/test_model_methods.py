"""What diffusers' models have, on a `CatTransformer`: every public name of theirs works, or is refused in a line."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import JointAttnProcessor2_0, PAGJointAttnProcessor2_0
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import CatError, CheckpointError, SettingsError
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings

Use = Callable[[Any], Any]

FULL = PruneSettings(keep_ratio=1.0, full_steps=2, num_clusters=3)
PRUNED = FULL.replace(keep_ratio=0.4)
CPU = torch.device("cpu")
SOURCES = (
    *(SD3Transformer2DModel, PixArtTransformer2DModel, FluxTransformer2DModel),
    *(ModelMixin, CacheMixin, PeftAdapterMixin, AttentionMixin),
)

# What works on every engine, and how it is used.
WORKS: dict[str, Use] = {
    "active_adapters": lambda t: t.active_adapters(),
    "attn_processors": lambda t: t.attn_processors,
    "cache_context": lambda t: t.cache_context("cond", step_index=0).__enter__(),
    "config": lambda t: t.config.in_channels,
    "config_name": lambda t: t.config_name,
    "cuda": lambda t: hasattr(t, "cuda"),  # as torch's own
    "delete_adapters": lambda t: t.delete_adapters([]),
    "device": lambda t: t.device,
    "disable_adapters": lambda t: t.disable_adapters(),
    "disable_cache": lambda t: t.disable_cache(),
    "disable_forward_chunking": lambda t: t.disable_forward_chunking(),
    "disable_gradient_checkpointing": lambda t: t.disable_gradient_checkpointing(),
    "disable_lora": lambda t: t.disable_lora(),
    "disable_npu_flash_attention": lambda t: t.disable_npu_flash_attention(),
    "disable_xformers_memory_efficient_attention": lambda t: t.disable_xformers_memory_efficient_attention(),
    "disable_xla_flash_attention": lambda t: t.disable_xla_flash_attention(),
    "dtype": lambda t: t.dtype,
    "enable_adapters": lambda t: t.enable_adapters(),
    "enable_lora": lambda t: t.enable_lora(),
    "float": lambda t: t.float(),
    "forward": lambda t: t.forward,
    "get_memory_footprint": lambda t: t.get_memory_footprint(),
    "half": lambda t: t.half(),
    "has_compatibles": lambda t: t.has_compatibles,
    "ignore_for_config": lambda t: t.ignore_for_config,
    "is_cache_enabled": lambda t: t.is_cache_enabled,
    "is_gradient_checkpointing": lambda t: t.is_gradient_checkpointing,
    "load_lora_adapter": lambda t: t.load_lora_adapter,  # test_adapters
    "num_parameters": lambda t: t.num_parameters(),
    "register_to_config": lambda t: t.register_to_config(sample_size=8),
    "reset_attention_backend": lambda t: t.reset_attention_backend(),
    "save_lora_adapter": lambda t: t.save_lora_adapter,  # below
    "set_adapter": lambda t: t.set_adapter,  # below
    "set_adapters": lambda t: t.set_adapters,  # test_adapters
    "set_attention_backend": lambda t: t.set_attention_backend("native"),
    "set_use_memory_efficient_attention_xformers": lambda t: t.set_use_memory_efficient_attention_xformers(False),
    "set_use_npu_flash_attention": lambda t: t.set_use_npu_flash_attention(False),
    "set_use_xla_flash_attention": lambda t: t.set_use_xla_flash_attention(False),
    "to": lambda t: t.to(torch.bfloat16),
    "unfuse_lora": lambda t: t.unfuse_lora(),
    "unload_lora": lambda t: t.unload_lora(),
}
# What changes a module: works with the torch engine, and is refused where graphs are run.
OF_THE_MODULE: dict[str, Use] = {
    "add_adapter": lambda t: t.add_adapter(peft.LoraConfig(target_modules=["to_q"])),
    "dequantize": lambda t: hasattr(t.engine, "transformer") or t.dequantize(),  # diffusers' own error
    "enable_layerwise_casting": lambda t: t.enable_layerwise_casting(torch.bfloat16),
    "fuse_lora": lambda t: t.fuse_lora(),
    "fuse_qkv_projections": lambda t: t.fuse_qkv_projections(),
    "set_attn_processor": lambda t: t.set_attn_processor(JointAttnProcessor2_0()),
    "set_default_attn_processor": lambda t: hasattr(t.engine, "transformer") or t.set_default_attn_processor(),
    "unfuse_qkv_projections": lambda t: (t.fuse_qkv_projections(), t.unfuse_qkv_projections()),
}
# What is refused on every engine.
REFUSED = {
    "compile_repeated_blocks",
    "enable_cache",
    "enable_forward_chunking",
    "enable_gradient_checkpointing",
    "enable_group_offload",
    "enable_lora_hotswap",
    "enable_npu_flash_attention",
    "enable_parallelism",
    "enable_xformers_memory_efficient_attention",
    "enable_xla_flash_attention",
    "extract_init_dict",
    "from_config",
    "from_pretrained",
    "from_single_file",
    "get_config_dict",
    "load_config",
    "push_to_hub",
    "register_for_auto_class",
    "save_config",
    "save_pretrained",
    "to_json_file",
    "to_json_string",
}


@pytest.fixture(params=["torch", "onnxruntime"])
def transformer(request: pytest.FixtureRequest, make_tiny: Callable[..., Any], export_tiny: Any) -> Any:
    """A tiny SD3 on each engine; the torch engine's module is the test's own."""
    if request.param == "torch":
        return CatTransformer(TorchStepEngine(make_tiny("sd3")), PRUNED)
    export = export_tiny("sd3")
    return CatTransformer(OnnxRuntimeStepEngine(export.directory, export.step.family, torch.float32), PRUNED)


@pytest.fixture
def image(pipeline_call: Callable[..., Any], make_tiny: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """The outputs of four calls of a transformer of a kind, as of one image."""

    def outputs(transformer: Any, kind: str = "sd3") -> list[Tensor]:
        arguments = pipeline_call(make_tiny(kind), batch=2, grid=(4, 5)).arguments
        noise = []
        with torch.no_grad():
            for level in (1.0, 0.7, 0.4, 0.1):
                timestep = torch.full_like(arguments["timestep"], level)
                noise.append(transformer(**arguments | {"timestep": timestep}, return_dict=False)[0].float())
        return noise

    return outputs


def public_names() -> set[str]:
    classes = {base for source in SOURCES for base in source.__mro__ if not issubclass(nn.Module, base)}
    return {name for cls in classes for name in vars(cls) if not name.startswith("_")}


def test_every_public_name_of_diffusers_is_decided() -> None:
    decided = {*WORKS, *OF_THE_MODULE, *REFUSED}
    assert public_names() - decided == set(), "new in diffusers: decide what a CatTransformer does"
    assert decided - public_names() == set(), "gone from diffusers"
    assert len(decided) == len(WORKS) + len(OF_THE_MODULE) + len(REFUSED)


@pytest.mark.parametrize("name", [*WORKS, *OF_THE_MODULE])
def test_what_works(transformer: Any, name: str) -> None:
    if name in WORKS:
        WORKS[name](transformer)
    elif isinstance(transformer.engine, TorchStepEngine):
        OF_THE_MODULE[name](transformer)
    else:
        with pytest.raises(CatError, match=r"^[^;\n]+; [^;\n]+$"):
            OF_THE_MODULE[name](transformer)


@pytest.mark.parametrize("name", sorted({*REFUSED, "compile", "_load_ip_adapter_weights"}))
def test_what_is_refused_says_what_to_do(transformer: Any, name: str) -> None:
    with pytest.raises(SettingsError, match=rf"^a CatTransformer has no {name}; [^;\n]+$"):
        getattr(transformer, name)()


def test_classes_are_not_loaded_from() -> None:
    with pytest.raises(SettingsError, match=r"from_pretrained; CatTransformer\.from_bundle loads a bundle, from_model"):
        CatTransformer.from_pretrained("sd3", subfolder="transformer")  # type: ignore[attr-defined]


@pytest.mark.parametrize("valid", ["xformers", "npu", "xla"])
def test_other_attentions_are_refused(transformer: Any, valid: str) -> None:
    called = "memory_efficient_attention_xformers" if valid == "xformers" else f"{valid}_flash_attention"
    with pytest.raises(SettingsError, match="leave it out"):
        getattr(transformer, f"set_use_{called}")(True)
    with pytest.raises(SettingsError, match="no attention backend 'flash'; leave it out"):
        transformer.set_attention_backend("flash")


def test_weights_are_counted_as_the_models(transformer: Any, make_tiny: Callable[..., Any]) -> None:
    module = make_tiny("sd3")
    assert transformer.num_parameters() == module.num_parameters()
    assert transformer.num_parameters(exclude_embeddings=True) == module.num_parameters(exclude_embeddings=True)
    assert transformer.get_memory_footprint() == module.get_memory_footprint()
    weight = next(transformer.parameters())
    assert (weight.device, weight.dtype) == (CPU, torch.float32)


def test_a_new_value_of_the_config_is_read(transformer: Any) -> None:
    transformer.register_to_config(sample_size=8)
    assert (transformer.config.sample_size, transformer.config.in_channels) == (8, 4)


def test_graphs_stay_where_they_are_and_say_so(transformer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cat_pruning"):
        for move in (transformer.float, transformer.half, transformer.bfloat16):
            move()
    if isinstance(transformer.engine, TorchStepEngine):
        assert (transformer.dtype, caplog.messages) == (torch.bfloat16, [])
    else:
        said = "the engine onnxruntime stays on cpu in torch.float32 wherever its pipeline goes; cat-export --dtype"
        assert transformer.dtype == torch.float32
        assert len(caplog.messages) == 1
        assert caplog.messages[0].startswith(said)


def test_copies_have_images_of_their_own(transformer: Any, image: Any) -> None:
    image(transformer)
    other = copy.copy(transformer)
    assert (other.engine, other.settings, other.last_step) == (transformer.engine, transformer.settings, None)
    other.settings = FULL
    assert transformer.settings == PRUNED
    with pytest.raises(SettingsError, match=r"cannot be pickled: .*; load the pipeline in every process"):
        pickle.dumps(transformer)


def test_offloading_hooks_move_no_image(transformer: Any, image: Any) -> None:
    """`enable_model_cpu_offload` calls `to` before every call of the transformer."""
    before = image(transformer)
    _, hook = accelerate.cpu_offload_with_hook(transformer, CPU)
    after = image(transformer)
    hook.offload()
    assert transformer.last_step.step == 3
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch's, of an RMS norm
@pytest.mark.parametrize("kind", ["sd3", "pixart-alpha", "flux-dev"])
def test_autocast_is_as_on_the_module(kind: str, make_tiny: Callable[..., Any], image: Any) -> None:
    module = make_tiny(kind)
    with torch.autocast("cpu", torch.bfloat16):
        expected = image(module, kind)
        actual = image(CatTransformer.from_model(module, FULL), kind)
        pruned = image(CatTransformer.from_model(module, PRUNED), kind)
    scale = max(float(noise.abs().max()) for noise in expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2**-7 * scale)  # a rounding of bf16, of the largest
    assert all(noise.isfinite().all() for noise in pruned)


@pytest.mark.parametrize("kind", ["sd3", "pixart", "flux-dev"])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_layerwise_casting_is_as_on_the_module(
    kind: str, storage: torch.dtype, make_tiny: Callable[..., Any], image: Any
) -> None:
    expected_of, module = make_tiny(kind), make_tiny(kind)
    expected_of.enable_layerwise_casting(storage, torch.float32)
    transformer: Any = CatTransformer.from_model(module, FULL)
    plain = image(transformer, kind)
    transformer.enable_layerwise_casting(storage, torch.float32)
    expected, actual = image(expected_of, kind), image(transformer, kind)
    assert transformer.dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert not torch.equal(actual[0], plain[0])
    compiled = CatTransformer(TorchStepEngine(module, compiled=True), FULL)
    with pytest.raises(SettingsError, match=r"layerwise casting moves the weights .* pass cuda_graphs=False"):
        image(compiled, kind)


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        (lambda m: m.enable_group_offload(CPU, CPU, "leaf_level"), "group_offloading"),
        (lambda m: m.enable_cache(FirstBlockCacheConfig(0.1)), "fbc"),
        (lambda m: accelerate.cpu_offload(m, CPU), "sequential offload"),
    ],
)
def test_hooks_that_a_copy_would_lose_are_refused(
    hook: Use, said: str, make_tiny: Callable[..., Any], image: Any
) -> None:
    module = make_tiny("flux-dev")
    transformer = CatTransformer.from_model(module, PRUNED)
    hook(module)
    for use in (lambda: CatTransformer.from_model(module, PRUNED), lambda: image(transformer, "flux-dev")):
        with pytest.raises(SettingsError, match=rf"hooks that pruned steps would pass by \(.*{said}"):
            use()


class Mine(JointAttnProcessor2_0):
    """A user's own."""


@pytest.mark.parametrize("processor", [Mine(), PAGJointAttnProcessor2_0()])
def test_other_processors_are_refused_by_name(make_tiny: Callable[..., Any], processor: Any) -> None:
    module = make_tiny("sd3")
    transformer: Any = CatTransformer.from_model(module)
    said = rf"{type(processor).__name__}: .* changes what attention computes, .*; use the original transformer"
    with pytest.raises(SettingsError, match=said):
        transformer.set_attn_processor(processor)
    assert {type(one) for one in module.attn_processors.values()} == {JointAttnProcessor2_0}
    module.transformer_blocks[1].attn.set_processor(processor)
    with pytest.raises(SettingsError, match=said):
        CatTransformer.from_model(module)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # diffusers' own way to add a second
def test_adapters_by_peft_names(tmp_path: Any, make_tiny: Callable[..., Any]) -> None:
    transformer: Any = CatTransformer.from_model(make_tiny("sd3"))
    with pytest.raises(SettingsError, match="no adapter 'default' is loaded; loaded: none"):
        transformer.save_lora_adapter(tmp_path)
    for name in ("default", "other"):
        transformer.add_adapter(peft.LoraConfig(target_modules=["to_q"]), name)
    transformer.set_adapter("default")
    assert transformer.active_adapters() == ["default"]
    transformer.save_lora_adapter(tmp_path, adapter_name="other")
    assert list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when its compiler is first imported
def test_a_compiled_stand_in_is_one(make_tiny: Callable[..., Any]) -> None:
    transformer: Any = CatTransformer.from_model(make_tiny("sd3"), PRUNED)
    compiled: Any = torch.compile(transformer, backend="eager")
    with pytest.raises(CheckpointError, match="is a CatTransformer already; set its `settings`"):
        CatTransformer.from_model(compiled)
