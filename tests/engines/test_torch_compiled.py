"""The torch engine's faster steps: what they compute, and how little torch has to compile for them.

torch.compile runs with its `eager` backend here but once: that follows the same graphs and compiles nothing.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering

from cat_pruning.engines import torch_engine
from cat_pruning.engines.torch_compiled import LinearGelu, compile_blocks, fuse_gelu
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import EngineError
from cat_pruning.runtime.transformer import CatTransformer

GRID = (6, 8)
IGNORED = "ignore:.*torch.jit.script_method:DeprecationWarning"  # torch's own
TIMESTEPS = (900.0, 500.0, 400.0)


@pytest.fixture
def compile_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are followed and checked, and run as they are."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch_engine, "compile_blocks", functools.partial(compile_blocks, backend="eager"))


def inputs_of(engine: TorchStepEngine, seed: int, batch: int) -> dict[str, Tensor]:
    """Random inputs of the model."""
    dims = engine.family.dims(GRID, batch=batch, text_length=7, num_kept=0)
    generator, inputs = torch.Generator().manual_seed(seed), {}
    for name, shape in engine.family.input_shapes(dims).items():
        inputs[name] = engine.family.example_input(name, [int(size) for size in shape], generator)
    return inputs


def three_steps(
    engine: TorchStepEngine, seed: int = 0, batch: int = 2, residuals: Sequence[Tensor] = (), **changes: Tensor
) -> list[Tensor]:
    """The noise after a full and two pruned steps, and the caches then."""
    inputs = inputs_of(engine, seed, batch) | changes
    scale = engine.family.max_timestep / 1000
    session = engine.session()
    dims = engine.family.dims(GRID, batch=batch, text_length=7, num_kept=0)
    session.begin(dims, inputs, [scale * timestep for timestep in TIMESTEPS[:2]])  # the third is not expected
    every = torch.arange(GRID[0] * GRID[1], dtype=torch.int32).repeat(batch, 1)
    latents, outputs = inputs["hidden_states"], []
    for timestep, kept in zip(
        TIMESTEPS, (every, every[:, 5:17].contiguous(), every[:, 1:24:2].contiguous()), strict=True
    ):
        outputs.append(session.step(latents, scale * timestep, kept, residuals))
        latents = latents * 0.9
    return [*outputs, *session._caches]


def in_one_session(engine: TorchStepEngine) -> Callable[[], Tensor]:
    """The noise of an image's first step, computed whenever it is called, always in the same session."""
    session, inputs = engine.session(), inputs_of(engine, seed=0, batch=2)
    dims = engine.family.dims(GRID, batch=2, text_length=7, num_kept=0)
    every = torch.arange(GRID[0] * GRID[1], dtype=torch.int32).repeat(2, 1)

    def full_step() -> Tensor:
        session.begin(dims, inputs, TIMESTEPS)
        return session.step(inputs["hidden_states"], TIMESTEPS[0], every)

    return full_step


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.usefixtures("compile_eagerly")
@pytest.mark.parametrize("kind", ["sd3.5", "pixart-alpha", "flux-dev"])  # each with all that its family has
def test_computes_what_the_plain_steps_do(tiny_transformer: Any, kind: str) -> None:
    """With a control net's residuals too, and where skip-layer guidance leaves a block out; of one compilation."""
    plain, fast = (TorchStepEngine(tiny_transformer, compiled=compiled) for compiled in (False, True))
    expected = three_steps(plain)
    assert_close(three_steps(fast), expected)
    if kind == "sd3.5":  # the block has no gates then
        gates = torch.tensor([0.0, 1.0])
        without = three_steps(fast, layer_gates=gates)
        assert_close(without, three_steps(plain, layer_gates=gates))
        assert not torch.allclose(without[0], three_steps(fast, layer_gates=torch.ones(2))[0])
    if not kind.startswith("pixart"):  # which has no control nets
        generator = torch.Generator().manual_seed(0)
        residuals = [torch.randn(2, 48, 32, generator=generator) for _ in range(plain.family.num_residuals)]
        changed = three_steps(plain, residuals=residuals)
        assert_close(three_steps(fast, residuals=residuals), changed)
        assert not torch.allclose(three_steps(fast)[1], changed[1], atol=1e-2)


@pytest.mark.long
@pytest.mark.usefixtures("compile_eagerly")
def test_blocks_of_one_kind_share_a_graph(make_tiny: Any) -> None:
    """One of each kind of block, SD3's last being a kind of its own, for each shape; and one of the embedding."""
    torch._dynamo.utils.counters.clear()
    fast = TorchStepEngine(make_tiny("sd3", num_layers=4), compiled=True)
    for seed in range(2):
        three_steps(fast, seed)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * 2 + 1  # full and pruned


@pytest.mark.long
@pytest.mark.usefixtures("compile_eagerly")
def test_one_session_for_images_of_two_shapes(make_tiny: Any) -> None:
    transformer = make_tiny("sd3", num_layers=1)
    fast, plain = (CatTransformer.from_model(transformer, compiled=compiled) for compiled in (True, False))
    for batch, size in ((2, 16), (4, 12), (2, 16)):
        generator = torch.Generator().manual_seed(batch + size)
        call = {
            "hidden_states": torch.randn(batch, 4, size, size, generator=generator),
            "encoder_hidden_states": torch.randn(batch, 7, 24, generator=generator),
            "pooled_projections": torch.randn(batch, 20, generator=generator),
        }
        for timestep in torch.linspace(1000, 100, 10):
            mine, theirs = (each(timestep=timestep, **call).sample for each in (fast, plain))
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.usefixtures("compile_eagerly")
def test_adapters_are_seen(make_tiny: Any) -> None:
    peft = pytest.importorskip("peft")
    transformer = make_tiny("sd3", num_layers=1)
    plain, fast = (TorchStepEngine(transformer, compiled=compiled) for compiled in (False, True))
    before = three_steps(fast)
    transformer.train()  # whose adapters drop out, which a step's must not
    config = {"target_modules": ["to_q", "norm1.linear", "ff.net.0.proj"], "lora_dropout": 0.5}
    transformer.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, **config))
    after = three_steps(fast)
    assert not torch.allclose(after[0], before[0])
    assert_close(after, three_steps(plain))


@pytest.mark.long
@pytest.mark.usefixtures("compile_eagerly")
def test_adapters_that_are_scaled_and_fused_between_images(make_tiny: Any) -> None:
    """In one session, which keeps its copy of the module; a fused adapter lies in the weights' own memory."""
    peft = pytest.importorskip("peft")
    transformer = make_tiny("sd3", num_layers=1)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "ff.net.0.proj"], init_lora_weights=False)
    transformer.add_adapter(config)
    fast = TorchStepEngine(transformer, compiled=True)
    full_step, noises = in_one_session(fast), []
    for change in (
        lambda: None,
        lambda: transformer.set_adapters("default", 0.5),
        transformer.fuse_lora,
        transformer.unfuse_lora,
    ):
        change()
        noises.append(full_step())
        torch.testing.assert_close(noises[-1], three_steps(TorchStepEngine(transformer, compiled=False))[0])
    assert not torch.allclose(noises[0], noises[1])
    torch.testing.assert_close(noises[1], noises[2])


@pytest.fixture(scope="module")
def quantization() -> Iterator[Any]:
    """torchao's module, which `make install` puts beside the other packages."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(Path(sys.prefix, "torchao"))
    with warnings.catch_warnings(action="ignore"):  # of its own marks and enumerations
        yield importlib.import_module("torchao.quantization")
    patch.undo()


@pytest.mark.long
@pytest.mark.usefixtures("compile_eagerly")
@pytest.mark.parametrize("config", ["Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_weights_that_torchao_quantizes_between_images(make_tiny: Any, quantization: Any, config: str) -> None:
    """In one session, which sees it though no module is another; float8 products take a GPU, see tests/gpu."""
    transformer = make_tiny("sd3", num_layers=1)
    fast = TorchStepEngine(transformer, compiled=True)
    full_step, noises = in_one_session(fast), []
    for change in (
        lambda: None,
        lambda: quantization.quantize_(
            transformer, getattr(quantization, config)(set_inductor_config=False), filter_fn=quantized_in_blocks
        ),
    ):
        change()
        noises.append(full_step())
    expected = three_steps(TorchStepEngine(transformer, compiled=False))
    assert 1e-5 < distance(noises[1], noises[0]) < 0.1
    # Another rounding may take an activation to the next of its eight-bit values.
    for mine, theirs in zip((noises[1], *three_steps(fast)), (expected[0], *expected), strict=True):
        assert distance(mine, theirs) < 2e-3


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def quantized_in_blocks(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, nn.Linear) and "blocks." in name and ".norm" not in name


def test_more_shapes_than_torch_keeps_graphs_of(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_with_room_for_one(transformer: Any) -> None:
        compile_blocks(transformer, backend="eager")
        torch._dynamo.config.recompile_limit = 1

    torch._dynamo.reset()
    monkeypatch.setattr(torch_engine, "compile_blocks", compile_with_room_for_one)
    told = r"torch\.compile keeps 1 graphs of a block.*; begin a new process, or pass"
    with torch._dynamo.config.patch(recompile_limit=8), pytest.raises(EngineError, match=told):
        three_steps(TorchStepEngine(make_tiny("pixart"), compiled=True))
    assert torch._dynamo.config.recompile_limit > 1


@pytest.mark.long
@pytest.mark.filterwarnings(IGNORED)
def test_compiled_by_torch(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its default backend, once: what it makes agrees, and copies no whole cache to change some of its rows.

    Its passes are all run, and its calls of torch's own kernels; it writes no kernels, for which a C++ compiler would
    run for twenty seconds. On a GPU tests/gpu/test_torch_engine.py has it write them.
    """
    torch._dynamo.reset()
    sources: list[str] = []
    original = GraphLowering.codegen

    def codegen(graph: GraphLowering) -> Any:
        made: Any = original(graph)
        sources.append(made[0].value)
        return made

    monkeypatch.setattr(GraphLowering, "codegen", codegen)
    transformer = make_tiny("pixart", num_layers=1)
    plain, fast = (TorchStepEngine(transformer, compiled=compiled) for compiled in (False, True))
    with torch._inductor.config.patch(fx_graph_cache=False, fallback_by_default=True):
        assert_close(three_steps(fast), three_steps(plain))
    writes = [line for source in sources for line in source.splitlines() if "torch.ops.cat.write_" in line]
    assert len(writes) == 4  # key and value, of a full and of a pruned step
    assert all(".default(arg" in line for line in writes)  # the caches themselves, which are arguments


def test_gelu_in_the_product(make_tiny: Any) -> None:
    block = make_tiny("flux-dev").single_transformer_blocks[0]
    rows = torch.randn(2, 5, block.proj_mlp.in_features)
    expected = block.act_mlp(block.proj_mlp(rows))
    fuse_gelu(block)
    assert isinstance(block.proj_mlp, LinearGelu)
    torch.testing.assert_close(block.act_mlp(block.proj_mlp(rows)), expected)


def test_only_a_gelu_by_tanh_is_taken_into_the_product() -> None:
    from diffusers.models.activations import GELU

    for layer, is_taken in (
        (GELU(4, 8, approximate="tanh"), True),
        (GELU(4, 8), False),
        (GELU(4, 8, "tanh", False), False),
    ):
        rows = torch.randn(2, 3, 4)
        expected = layer(rows)
        fuse_gelu(layer)
        assert isinstance(layer.proj, LinearGelu) == is_taken
        torch.testing.assert_close(layer(rows), expected)


def test_a_compiler_that_fails_is_told(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> None:
        raise RuntimeError("no compiler")

    torch._dynamo.reset()
    monkeypatch.setattr(torch_engine, "compile_blocks", functools.partial(compile_blocks, backend=broken))
    with pytest.raises(EngineError, match=r"torch\.compile failed \(.*no compiler.*\); pass compiled=False"):
        three_steps(TorchStepEngine(make_tiny("pixart"), compiled=True))


def compiled_by_the_user(transformer: nn.Module) -> nn.Module:
    return torch.compile(transformer)  # type: ignore[return-value]


def with_compiled_blocks(transformer: nn.Module) -> nn.Module:
    for block in transformer.transformer_blocks:  # type: ignore[union-attr]  # a list of modules
        block.compile()
    return transformer


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("compile_it", [compiled_by_the_user, with_compiled_blocks])
def test_what_the_user_compiled_stays_compiled(make_tiny: Any, compile_it: Callable[[nn.Module], nn.Module]) -> None:
    transformer = make_tiny("sd3")
    given = compile_it(transformer)
    engine = TorchStepEngine(given)
    assert engine.transformer is transformer
    assert engine.compiled
    assert not TorchStepEngine(given, compiled=False).compiled
    assert not TorchStepEngine(make_tiny("sd3")).compiled


@pytest.mark.parametrize("kind", ["sd3", "sd3.5", "pixart", "flux-dev"])
def test_fused_projections_are_used(make_tiny: Any, kind: str) -> None:
    """diffusers' `fuse_qkv_projections`: to the bit what diffusers makes of them; and taken apart again, unused."""
    transformer = make_tiny(kind)
    expected = three_steps(TorchStepEngine(transformer))
    transformer.fuse_qkv_projections()
    fused = [module.to_qkv for module in transformer.modules() if hasattr(module, "to_qkv")]
    assert fused
    assert_close(three_steps(TorchStepEngine(transformer)), expected)
    with torch.no_grad():
        for linear in fused:
            linear.weight.zero_()
    assert not torch.allclose(three_steps(TorchStepEngine(transformer))[0], expected[0])
    transformer.unfuse_qkv_projections()
    assert_close(three_steps(TorchStepEngine(transformer)), expected)
