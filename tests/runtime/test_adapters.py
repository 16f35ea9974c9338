"""Adapters in sd3-mini's bundle: whole pipelines, TensorRT's refit over the double, and what cannot be refitted."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_double import recorder
from tensorrt_double import TensorRTDouble
from torch import Tensor

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.engines.cuda_graphs import CudaGraphs
from cat_pruning.engines.graph_weights import GraphWeights
from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.engines.turns import Turns
from cat_pruning.errors import BundleError, EngineError
from cat_pruning.runtime.engine_choice import engine_from_bundle
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.settings import PruneSettings

Make = Callable[..., Any]
STEPS = 5
ROUNDING = 1e-3  # of two libraries over an image, as in test_parity
SETTINGS = {"full_steps": 3}
# Of prompt.onnx, timestep.onnx and step.onnx.
TARGETS = ("context_embedder", "transformer_blocks.1.norm1.linear", "transformer_blocks.0.attn.to_q")
# Weights that TensorRT is asked for together: of a fused projection, and of a query and the constant that scales it.
COMBINED = [
    [f"transformer.transformer_blocks.0.attn.to_{name}.weight.T" for name in "qkv"],
    ["transformer.transformer_blocks.0.attn.to_q.weight.T", "query_scale_0.353553391_float"],
]


def adapter(config: Any, seed: int) -> dict[str, Tensor]:
    width, generator = config["num_attention_heads"] * config["attention_head_dim"], torch.Generator().manual_seed(seed)
    rows = {"context_embedder": (width, config["joint_attention_dim"]), "linear": (6 * width, width)}
    weights = {}
    for name in TARGETS:
        outputs, inputs = rows.get(name.rpartition(".")[2], (width, width))
        weights[f"transformer.{name}.lora_A.weight"] = 0.2 * torch.randn(2, inputs, generator=generator)
        weights[f"transformer.{name}.lora_B.weight"] = 0.2 * torch.randn(outputs, 2, generator=generator)
    return weights


@pytest.fixture
def mini_one(mini_pipeline: Any) -> dict[str, Tensor]:
    """One of sd3-mini, which the bundle is of; the others are of the tiny SD3."""
    return adapter(mini_pipeline.transformer.config, 1)


@pytest.fixture
def one(engines: dict[str, StepEngine]) -> dict[str, Tensor]:
    return adapter(engines["torch"].family.config, 1)


@pytest.fixture
def two(engines: dict[str, StepEngine]) -> dict[str, Tensor]:
    return adapter(engines["torch"].family.config, 2)


def final(sample: Make, pipe: Any, **arguments: Any) -> Tensor:
    latents: Tensor = sample(pipe, STEPS, (48, 80), **arguments).final
    return latents


def with_and_without(sample: Make, untouched: Any, one: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an untouched pipeline computes without an adapter and with one, which it has then."""
    images = {"base": final(sample, untouched)}
    untouched.load_lora_weights(one)
    images["one"] = final(sample, untouched)
    assert (images["one"] - images["base"]).abs().max() > 0.1
    return images


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_the_pipeline_of_a_bundle_takes_adapters(
    mini_bundle: Path, mini_pipeline: Any, mini_one: dict[str, Tensor], sample: Make, name: str
) -> None:
    expected = with_and_without(sample, mini_pipeline, mini_one)
    pipe = load_pipeline(mini_bundle, name, settings=PruneSettings(keep_ratio=1.0))
    pipe.set_progress_bar_config(disable=True)
    base = final(sample, pipe)
    pipe.load_lora_weights(mini_one, adapter_name="one")
    torch.testing.assert_close(final(sample, pipe), expected["one"], rtol=0, atol=ROUNDING)
    pipe.unload_lora_weights()
    assert torch.equal(final(sample, pipe), base)
    torch.testing.assert_close(base, expected["base"], rtol=0, atol=ROUNDING)


def test_only_graphs_that_change_are_loaded_anew(mini_bundle: Path, mini_one: dict[str, Tensor]) -> None:
    pipe = load_pipeline(mini_bundle, "onnxruntime")
    engine = pipe.transformer.engine
    before = dict(engine.graphs)
    in_step = {name: weight for name, weight in mini_one.items() if "to_q" in name}
    pipe.load_lora_weights(in_step)
    assert {part for part in before if engine.graphs[part] is not before[part]} == {"step"}
    pipe.unload_lora_weights()
    assert engine.graphs["step"].replaced == {}


def test_graphs_that_are_replaced_are_let_go_of(mini_bundle: Path, mini_one: dict[str, Tensor], sample: Make) -> None:
    """By the thread that loads, whose last image's memory was bound to them; not when its next image begins."""
    pipe = load_pipeline(mini_bundle, "onnxruntime")
    pipe.set_progress_bar_config(disable=True)
    final(sample, pipe)
    old = weakref.ref(pipe.transformer.engine.graphs["step"])
    pipe.load_lora_weights(mini_one)
    gc.collect()
    assert old() is None


def test_a_bundle_that_was_changed_is_not_read(mini_bundle: Path, mini_one: dict[str, Tensor], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(mini_bundle, tmp_path / "bundle"))
    pipe = load_pipeline(bundle, "onnxruntime")
    data = bundle / "step.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleError, match="was changed after the export"):
        pipe.load_lora_weights(mini_one)


# ------------------------------------------------------------------ TensorRT, over the double


@pytest.mark.parametrize("kind", ["in place", "two cache sets"])
@pytest.mark.parametrize("captures", [False, True])
def test_plans_are_refitted(
    make_tensorrt: Make,
    drop_in: Make,
    sample: Make,
    one: dict[str, Tensor],
    two: dict[str, Tensor],
    pipeline: Make,
    make_tiny_sd3: Make,
    library: TensorRTDouble,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    captures: bool,
) -> None:
    """What is combined is given whole; a captured step, which may keep the old weights, is never replayed."""
    monkeypatch.setattr("cat_pruning.engines.step_engine.CudaGraphs", lambda: CudaGraphs(recorder(library)))
    expected = with_and_without(sample, pipeline(make_tiny_sd3()), one)
    engine = make_tensorrt(kind, combined=COMBINED, cuda_graphs=captures)
    pipe = drop_in(engine, keep_ratio=1.0)
    base = final(sample, pipe)
    torch.testing.assert_close(base, expected["base"], rtol=0, atol=ROUNDING)
    pipe.load_lora_weights(one, adapter_name="one")
    with_one = final(sample, pipe)
    torch.testing.assert_close(with_one, expected["one"], rtol=0, atol=ROUNDING)
    if captures:
        assert pipe.transformer._sampling().image.session._graphs.num_captured
    pipe.load_lora_weights(two, adapter_name="two")
    assert not torch.equal(final(sample, pipe), with_one)
    pipe.set_adapters("one")
    assert torch.equal(final(sample, pipe), with_one)
    pipe.unload_lora_weights()
    assert torch.equal(final(sample, pipe), base)
    assert library.calls.count("refit_cuda_engine") == 4 * 3


def test_an_image_in_progress_is_not_finished_with_other_weights(
    make_tensorrt: Make, drop_in: Make, sample: Make, one: dict[str, Tensor]
) -> None:
    pipe = drop_in(make_tensorrt(combined=[]), **SETTINGS)
    other = drop_in(pipe.transformer.engine, **SETTINGS)
    base = final(sample, pipe)
    with pytest.raises(EngineError, match="adapters were changed while this image was in progress; generate it again"):
        final(sample, pipe, on_step=lambda step: other.load_lora_weights(one) if step == 1 else None)
    with_one = final(sample, pipe)
    assert not torch.equal(with_one, base)
    assert torch.equal(final(sample, other), with_one)


@pytest.mark.parametrize("call", ["set_named_weights", "refit_cuda_engine"])
def test_a_refit_that_fails(
    make_tensorrt: Make, drop_in: Make, sample: Make, library: TensorRTDouble, one: dict[str, Tensor], call: str
) -> None:
    pipe = drop_in(make_tensorrt(combined=[]), **SETTINGS)
    base = final(sample, pipe)
    library.fail.add(call)
    with pytest.raises(
        EngineError, match=r"refuses the weights .*: count mismatch|cannot be refitted: .*out of memory"
    ):
        pipe.load_lora_weights(one)
    with pytest.raises(EngineError, match=r"a refit .* failed half done; unload the adapters"):
        final(sample, pipe)
    library.fail.clear()
    pipe.load_lora_weights(one)
    assert not torch.equal(final(sample, pipe), base)
    pipe.unload_lora_weights()
    assert torch.equal(final(sample, pipe), base)


def test_weights_that_a_plan_does_not_know(
    make_tensorrt: Make, drop_in: Make, one: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = drop_in(make_tensorrt(combined=[]))
    monkeypatch.setattr("tensorrt_double.Refitter.get_all_weights", lambda self: ["onnx::MatMul_1"])
    with pytest.raises(EngineError, match=r"has no refittable weights transformer\.context_embedder\.weight"):
        pipe.load_lora_weights(one)
    assert pipe.get_list_adapters() == {}


def test_plans_that_are_not_refittable(
    make_tensorrt: Make, drop_in: Make, one: dict[str, Tensor], sample: Make
) -> None:
    pipe = drop_in(make_tensorrt(), **SETTINGS)
    with pytest.raises(EngineError, match=r"not built to take adapters; .*cat-export … --refittable.*--lora") as caught:
        pipe.load_lora_weights(one)
    assert "\n" not in str(caught.value)
    pipe.unload_lora_weights()  # there is nothing to unload
    pipe.disable_lora()
    assert pipe.get_list_adapters() == {}
    assert pipe.get_active_adapters() == []
    final(sample, pipe)


def test_an_engine_of_another_kind(engines: dict[str, StepEngine]) -> None:
    class Fixed(StepEngine):
        name = "fixed"

        def session(self) -> Any:
            raise NotImplementedError

    for call in (Fixed().base_weights, lambda: Fixed().set_weights({})):
        with pytest.raises(EngineError, match=r"the engine fixed takes no other weights"):
            call()


def test_old_bundles_have_no_refittable_plans(mini_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(mini_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    for plan in manifest["plans"]:
        del plan["refittable"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert not any(plan.refittable for plan in Bundle.open(bundle).manifest.plans)
    assert engine_from_bundle(Bundle.open(bundle), "onnxruntime").base_weights().parts


# ------------------------------------------------------------------ the weights of the graphs


def test_every_weight_of_a_layer_is_in_a_graph(tiny_export: Any) -> None:
    """Under its own name, with the values of the module: of every kind of model."""
    weights = GraphWeights(tiny_export.directory)
    transformer = tiny_export.step.transformer
    found = 0
    for name, module in transformer.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        for initializer in weights.initializers(f"{name}.weight"):
            stored = weights.read(initializer)
            assert torch.equal(stored.t() if initializer.endswith(".T") else stored, module.weight)
            found += 1
        assert weights.initializers(f"{name}.weight"), name
    assert found > 10


def test_a_change_is_added_as_the_weight_lies(export_tiny: Any) -> None:
    weights = GraphWeights(export_tiny("sd3").directory)
    (name,) = weights.initializers("transformer_blocks.0.attn.to_q.weight")
    change = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).half()
    expected = weights.read(name) + change.float().t()
    assert name.endswith(".T")
    assert torch.equal(weights.changed(name, change), expected)


def test_files_that_cannot_be_read(mini_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"prompt\.onnx cannot be read"):
        GraphWeights(tmp_path)
    for path in mini_bundle.glob("*.onnx"):
        shutil.copyfile(path, tmp_path / path.name)
    weights = GraphWeights(tmp_path)
    (name,) = weights.initializers("context_embedder.weight")
    with pytest.raises(
        BundleError, match=r"prompt\.onnx\.data: transformer\.context_embedder\.weight\S* cannot be read"
    ):
        weights.read(name)
    (tmp_path / "prompt.onnx.data").write_bytes(b"short")
    with pytest.raises(BundleError, match=r"prompt\.onnx\.data: transformer\.context_embedder.* cannot be read"):
        weights.read(name)


def test_an_interrupt_while_waiting_to_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()

    def interrupted(predicate: Callable[[], bool]) -> None:
        if not predicate():
            raise KeyboardInterrupt

    with turns.together(), monkeypatch.context() as patch:
        patch.setattr(turns._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), turns.alone():
            raise AssertionError("it goes alone beside another")
    with turns.together():
        pass
    with turns.alone():
        pass


def test_one_goes_alone() -> None:
    turns, seen = Turns(), []
    inside, leave = threading.Event(), threading.Event()

    def step() -> None:
        with turns.together():
            inside.set()
            assert leave.wait(10)
            seen.append("step")

    def refit() -> None:
        with turns.alone():
            seen.append("refit")
            time.sleep(0.05)
            seen.append("refitted")

    def later() -> None:
        with turns.together():
            seen.append("later")

    threads = [threading.Thread(target=target) for target in (step, refit, later)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    while not turns._alone:
        time.sleep(0.001)
    threads[2].start()
    time.sleep(0.02)
    assert seen == []
    leave.set()
    for thread in threads:
        thread.join(10)
    assert seen == ["step", "refit", "refitted", "later"]
