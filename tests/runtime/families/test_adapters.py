"""Adapters loaded into engines of several families, against diffusers' own pipelines and against fused exports."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cat_pruning.checkpoints.lora import fuse_loras, parse_lora
from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import CatError, CheckpointError, SettingsError
from cat_pruning.exporter.step_graph import export_step_graph
from cat_pruning.families.interception import StepModule
from cat_pruning.runtime.adapters import AdaptedWeights
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings

Make = Callable[..., Any]
NAMES = ("sd35-tiny", "flux-tiny")
STEPS = 3
SHAPE = {"size": (40, 72)}
PRUNED = {"full_steps": 2, "keep_ratio": 0.3, "num_clusters": 4}
# Modules of prompt.onnx, of timestep.onnx and of step.onnx.
TARGETS = ["context_embedder", "norm1.linear", "timestep_embedder.linear_1", "attn.to_q", "attn.to_k", "add_v_proj"]
TARGETS += ["ff.net.2", "norm.linear", "proj_mlp"]

# Diffusers' pipelines say which parts of theirs a file has nothing for.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:Adapter . was active")


def adapter(model: Any, seed: int = 0, rank: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random adapter as diffusers' training scripts save it."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(name.endswith(target) for target in TARGETS):
            a = 0.3 * torch.randn(rank, module.in_features, generator=generator)
            b = 0.3 * torch.randn(module.out_features, rank, generator=generator)
            weights |= {
                f"transformer.{name}.lora_A.weight": a.to(dtype),
                f"transformer.{name}.lora_B.weight": b.to(dtype),
            }
    return weights


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, models: Make) -> Any:
    return models(request.param)


@pytest.fixture
def drop_in(model: Any) -> Make:
    """A pipeline over an engine of the test's own, by name."""

    def make(engine: str = "onnxruntime", **settings: Any) -> Any:
        family = model.engines["torch"].family
        made = (
            OnnxRuntimeStepEngine(model.directory, family, torch.float32)
            if engine == "onnxruntime"
            else TorchStepEngine(copy.deepcopy(model.transformer))
        )
        return model.pipeline(CatTransformer(made, PruneSettings(**settings)))

    return make


def latents(sample: Make, pipe: Any) -> Tensor:
    final: Tensor = sample(pipe, STEPS, **SHAPE).final
    return final


@pytest.mark.long
@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_adapters_mean_what_they_mean_in_diffusers(model: Any, drop_in: Make, sample: Make, engine: str) -> None:
    reference = model.pipeline(copy.deepcopy(model.transformer))
    pipe = drop_in(engine, keep_ratio=1.0)
    tolerance = 0.0 if engine == "torch" else 2e-4
    seen = [latents(sample, reference)]

    def agree(*changes: Callable[[Any], object]) -> None:
        for change in changes:
            change(pipe)
            change(reference)
        expected = latents(sample, reference)
        torch.testing.assert_close(
            latents(sample, pipe), expected, rtol=0, atol=tolerance * float(expected.abs().max())
        )
        assert all((expected - other).abs().max() > 0.01 for other in seen)  # or the change would not matter
        seen.append(expected)
        assert pipe.get_active_adapters() == reference.get_active_adapters()
        assert pipe.get_list_adapters() == reference.get_list_adapters()

    one, two = adapter(model.transformer, 1), adapter(model.transformer, 2, rank=3)
    agree(lambda p: p.load_lora_weights(one, adapter_name="one"))
    agree(lambda p: p.load_lora_weights(two, adapter_name="two"))
    agree(lambda p: p.set_adapters(["one", "two"], [0.5, 0.8]))
    agree(lambda p: p.set_adapters("two", 0.3))
    agree(lambda p: p.set_adapters(["one", "two"], [0.4, -0.5]))


def test_weights_are_decided_by_what_is_loaded(model: Any, drop_in: Make, sample: Make) -> None:
    """To the bit, whatever was loaded before."""
    pipe = drop_in(**PRUNED)
    one, two = adapter(model.transformer, 1), adapter(model.transformer, 2)
    base = latents(sample, pipe)
    pipe.load_lora_weights(one, adapter_name="one")
    with_one = latents(sample, pipe)
    assert not torch.equal(with_one, base)
    pipe.load_lora_weights(two, adapter_name="two")
    assert not torch.equal(latents(sample, pipe), with_one)
    pipe.set_adapters("one")
    assert torch.equal(latents(sample, pipe), with_one)
    pipe.disable_lora()
    assert torch.equal(latents(sample, pipe), base)
    pipe.enable_lora()
    assert torch.equal(latents(sample, pipe), with_one)
    pipe.set_adapters(["one", "two"], [1.0, 0.0])
    assert torch.equal(latents(sample, pipe), with_one)
    pipe.delete_adapters("one")
    assert pipe.get_list_adapters() == {"transformer": ["two"]}
    pipe.unload_lora_weights()
    assert torch.equal(latents(sample, pipe), base)
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights(one)
    assert torch.equal(latents(sample, pipe), with_one)


def test_a_loaded_adapter_is_a_fused_one(model: Any, drop_in: Make, sample: Make, tmp_path: Path) -> None:
    save_file(adapter(model.transformer, 1), tmp_path / "one.safetensors", metadata={"format": "pt"})
    family = model.engines["torch"].family
    fused: Any = fuse_loras(model.make(), (parse_lora(f"{tmp_path / 'one.safetensors'}:0.7"),))
    export_step_graph(StepModule(fused, family), tmp_path)
    engine = OnnxRuntimeStepEngine(tmp_path, family, torch.float32)
    pipe = drop_in(**PRUNED)
    pipe.load_lora_weights(tmp_path, weight_name="one.safetensors", adapter_name="one")
    pipe.set_adapters("one", 0.7)
    # Every initializer, to the last bit or the one before.
    theirs, mine = engine.base_weights(), pipe.transformer.engine.base_weights()
    changed = AdaptedWeights(mine, pipe.transformer.adapters.module)
    assert len(changed) == len(adapter(model.transformer)) // 2
    assert {part for name in changed for part in mine.parts[name]} == {"prompt", "timestep", "step"}
    for name in theirs.parts:
        weight = changed[name] if name in changed else mine.read(name)
        torch.testing.assert_close(weight, theirs.read(name), rtol=1e-6, atol=1e-7)
    expected = latents(sample, model.pipeline(CatTransformer(engine, PruneSettings(**PRUNED))))
    torch.testing.assert_close(latents(sample, pipe), expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


def test_a_directory_of_peft(model: Any, drop_in: Make, sample: Make, tmp_path: Path) -> None:
    """With its own alpha, which the pipeline would not read."""
    weights = adapter(model.transformer, 1)
    targets = sorted({name.removeprefix("transformer.").partition(".lora_")[0] for name in weights})
    adapted = peft.get_peft_model(
        copy.deepcopy(model.transformer), peft.LoraConfig(r=2, lora_alpha=6.0, target_modules=targets)
    )
    state = {f"base_model.model.{name.removeprefix('transformer.')}": value for name, value in weights.items()}
    peft.set_peft_model_state_dict(adapted, state)
    adapted.save_pretrained(str(tmp_path))
    pipe = drop_in(**PRUNED)
    pipe.load_lora_weights(weights, adapter_name="file")
    pipe.set_adapters("file", 3.0)
    expected = latents(sample, pipe)
    pipe.unload_lora_weights()
    pipe.transformer.load_lora_adapter(tmp_path)
    torch.testing.assert_close(latents(sample, pipe), expected, rtol=0, atol=1e-5)
    pipe.unload_lora_weights()
    if model.name == "sd35-tiny":  # FLUX's pipeline itself takes it for something else
        with pytest.raises(CheckpointError, match=r"belongs to no part of the pipeline; of a PEFT directory, pipe\.tr"):
            pipe.load_lora_weights(tmp_path)


def test_half_precision_files_change_the_weights_in_fp32(model: Any, drop_in: Make) -> None:
    weights = adapter(model.transformer, 1, dtype=torch.float16)
    pipe = drop_in()
    pipe.load_lora_weights(weights)
    base = pipe.transformer.engine.base_weights()
    changed = AdaptedWeights(base, pipe.transformer.adapters.module)
    name = next(iter(weights)).removesuffix(".lora_A.weight")
    (initializer,) = base.initializers(f"{name.removeprefix('transformer.')}.weight")
    a, b = (weights[f"{name}.lora_{half}.weight"].float() for half in "AB")
    parameter = model.transformer.get_parameter(f"{name.removeprefix('transformer.')}.weight")
    expected = parameter + b @ a
    got = changed[initializer]
    assert torch.equal(got.t() if initializer.endswith(".T") else got, expected)


def test_an_image_in_progress_ends_with_its_weights(model: Any, drop_in: Make, sample: Make) -> None:
    """Of another thread; the thread that loads begins anew."""
    pipe = drop_in(**PRUNED)
    other = model.pipeline(copy.deepcopy(pipe.transformer))
    assert other.transformer.adapters is pipe.transformer.adapters
    base = latents(sample, other)
    weights = adapter(model.transformer, 1)
    half, loaded = threading.Event(), threading.Event()
    ended: list[Tensor] = []

    def wait(step: int) -> None:
        if step == 0:
            half.set()
            assert loaded.wait(20)

    thread = threading.Thread(target=lambda: ended.append(sample(other, STEPS, on_step=wait, **SHAPE).final))
    thread.start()
    assert half.wait(20)
    pipe.load_lora_weights(weights)
    loaded.set()
    thread.join()
    assert torch.equal(ended[0], base)
    with_adapter = latents(sample, pipe)
    assert not torch.equal(with_adapter, base)
    assert torch.equal(latents(sample, other), with_adapter)
    kinds = sample(pipe, STEPS, on_step=lambda step: pipe.disable_lora() if step == 1 else None, **SHAPE).calls
    assert [record.kind.value for record in kinds] == ["full", "full", "full"]  # the third one anew


def spoiled(weights: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    a, b = list(weights)[:2]
    if change == "nan":
        weights[b] = torch.full_like(weights[b], float("nan"))
    elif change == "no A":
        del weights[a]
    elif change == "no B":
        del weights[b]
    elif change == "nowhere":
        weights["transformer.transformer_blocks.9.attn.to_q.lora_A.weight"] = weights[a]
    elif change == "of no part":
        weights["decoder.lora_A.weight"] = weights[a]
    elif change == "dora":
        weights[a.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(weights[b].shape[0])
    elif change == "shape":
        weights[a], weights[b] = torch.ones(2, 7), torch.ones(7, 2)
    elif change == "rank":
        weights[a] = torch.ones(3, weights[a].shape[1])
    elif change == "kind":
        weights[a.replace("lora_A", "lora_C")] = weights[a]
    return weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rank", r"lora_A\.weight has rank 3, its other half 2"),
        ("nan", r"lora_B\.weight is not finite"),
        ("no A", r"lora_B\.weight has no lora_A\.weight"),
        ("no B", r"lora_A\.weight has no lora_B\.weight"),
        ("nowhere", r"transformer_blocks\.9\.attn\.to_q\.lora_A\.weight belongs to no module"),
        ("of no part", r"decoder\.lora_A\.weight belongs to no part of the pipeline"),
        ("dora", "it has DoRA, which only the torch engine and cat-export --lora take"),
        ("shape", r"lora_A\.weight has shape \(2, 7\), of a weight of \(\d+, \d+\)"),
        ("kind", r"lora_C\.weight is of no kind"),
    ],
)
def test_an_adapter_that_does_not_fit_leaves_what_was_there(
    model: Any, drop_in: Make, sample: Make, change: str, message: str
) -> None:
    pipe = drop_in(**PRUNED)
    good = adapter(model.transformer, 1)
    bad = spoiled(adapter(model.transformer, 2), change)
    with pytest.raises(CheckpointError, match=message):
        pipe.load_lora_weights(dict(bad), adapter_name="bad")
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights(adapter(model.transformer, 3), adapter_name="other")
    pipe.load_lora_weights(good, adapter_name="good")
    expected = latents(sample, pipe)
    with pytest.raises(CheckpointError, match=message) as caught:
        pipe.load_lora_weights(dict(bad), adapter_name="bad")
    assert "\n" not in str(caught.value)
    assert pipe.get_list_adapters() == {"transformer": ["other", "good"]}
    assert pipe.get_active_adapters() == ["good"]
    assert torch.equal(latents(sample, pipe), expected)
    pipe.load_lora_weights(adapter(model.transformer, 2), adapter_name="bad")  # the name is free


def test_a_scale_that_overflows_changes_nothing(model: Any, drop_in: Make, sample: Make) -> None:
    pipe = drop_in(**PRUNED)
    pipe.load_lora_weights(adapter(model.transformer, 1), adapter_name="one")
    expected = latents(sample, pipe)
    with pytest.raises(
        CheckpointError, match=r"with the adapters one at 1e\+39, transformer\.\S+ overflows .*float32; "
    ):
        pipe.set_adapters("one", 1e39)
    assert torch.equal(latents(sample, pipe), expected)
    big = {name: 1e20 * weight for name, weight in adapter(model.transformer, 2).items()}
    with pytest.raises(CheckpointError, match=r"the adapters two at 1, transformer\.\S+ overflows torch\.float32; "):
        pipe.load_lora_weights(big, adapter_name="two")
    assert pipe.get_list_adapters() == {"transformer": ["one"]}
    assert torch.equal(latents(sample, pipe), expected)
    pipe.set_adapters("one", 0.5)
    assert not torch.equal(latents(sample, pipe), expected)


def test_what_is_refused(model: Any, drop_in: Make, sample: Make, models: Make) -> None:
    pipe = drop_in()
    weights = adapter(model.transformer, 1)
    pipe.load_lora_weights(weights, adapter_name="one")
    refusals: list[tuple[type[CatError], str, Callable[[], object]]] = [
        (SettingsError, r"no adapter 'x' is loaded; loaded: one;", lambda: pipe.transformer.set_adapters("x")),
        (SettingsError, r"'one' is loaded already", lambda: pipe.load_lora_weights(weights, adapter_name="one")),
        (SettingsError, r"fuse_lora: adapters are always in the weights .*cat-export --lora", pipe.fuse_lora),
        (CheckpointError, r"no directory of PEFT's", lambda: pipe.transformer.load_lora_adapter("nowhere")),
    ]
    for kind, message, call in refusals:
        with pytest.raises(kind, match=message):
            call()
    with pytest.raises(ValueError, match="'x'"):  # diffusers' own
        pipe.set_adapters("x")
    assert pipe.get_active_adapters() == ["one"]
    assert pipe.transformer.active_adapters() == ["one"]


def test_a_file_for_text_encoders_only_is_for_them(model: Any, drop_in: Make, sample: Make) -> None:
    pipe = drop_in(**PRUNED)
    base = latents(sample, pipe)
    pipe.transformer.load_lora_adapter({"text_encoder.x.lora_A.weight": torch.ones(2, 4)}, adapter_name="text")
    pipe.transformer.set_adapters(["text"])
    assert torch.equal(latents(sample, pipe), base)


def test_a_class_that_diffusers_loads_none_into(models: Make) -> None:
    pixart = models("pixart-tiny")
    with pytest.raises(SettingsError, match=r"no adapters into a PixArtTransformer2DModel; .*cat-export --lora"):
        CatTransformer(pixart.engines["onnxruntime"]).load_lora_adapter({})


def test_alphas_of_a_file_for_flux(models: Make, sample: Make) -> None:
    flux = models("flux-tiny")
    weights = adapter(flux.transformer, 1)
    alphas = {f"{name.partition('.lora_A')[0]}.alpha": torch.tensor(4.0) for name in weights if "lora_A" in name}
    reference = flux.pipeline(copy.deepcopy(flux.transformer))
    engine = OnnxRuntimeStepEngine(flux.directory, flux.engines["torch"].family, torch.float32)
    pipe = flux.pipeline(CatTransformer(engine, PruneSettings(keep_ratio=1.0)))
    for each in (reference, pipe):
        each.load_lora_weights(weights | alphas)
    expected = latents(sample, reference)
    torch.testing.assert_close(latents(sample, pipe), expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


def test_norms_that_an_adapter_replaces_are_refused(models: Make) -> None:
    """FLUX's pipeline would leave them out with a warning."""
    flux = models("flux-tiny")
    engine = OnnxRuntimeStepEngine(flux.directory, flux.engines["torch"].family, torch.float32)
    pipe = flux.pipeline(CatTransformer(engine))
    norm = {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(16)}
    with pytest.raises(SettingsError, match="replaces norms"):
        pipe.load_lora_weights(adapter(flux.transformer) | norm)
    assert pipe.get_list_adapters() == {}
