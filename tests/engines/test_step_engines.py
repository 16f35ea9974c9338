"""What every step engine promises, on each of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.engines.step_engine import StepEngine, StepSession
from cat_pruning.errors import EngineError, ShapeError
from cat_pruning.families import family_named
from cat_pruning.step_io import Part, StepDims

TOKENS = 64  # of latents of 16 x 16
SIZE = (16, 16)


@pytest.fixture(params=["onnxruntime", "torch", "tensorrt in place", "tensorrt two cache sets"])
def engine(request: pytest.FixtureRequest, engines: dict[str, StepEngine]) -> StepEngine:
    """Every engine in turn; TensorRT's over a double of TensorRT."""
    if request.param in engines:
        return engines[request.param]
    make: Callable[..., StepEngine] = request.getfixturevalue("make_tensorrt")
    return make(request.param.removeprefix("tensorrt "), any_shape=True)


def dims(engine: StepEngine, size: tuple[int, int] = SIZE) -> StepDims:
    return engine.family.dims((size[0] // 2, size[1] // 2), batch=2, text_length=48, num_kept=0)


def conditioning(engine: StepEngine, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = engine.family.config
    arguments = {
        "encoder_hidden_states": torch.randn(2, 48, config["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(2, config["pooled_projection_dim"], generator=generator),
    }
    return engine.family.conditioning(arguments, (8, 8))


def latents(engine: StepEngine, seed: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(2, engine.family.config["in_channels"], *size, generator=torch.Generator().manual_seed(seed))


def begun(engine: StepEngine, seed: int = 0, size: tuple[int, int] = SIZE) -> StepSession:
    session = engine.session()
    session.begin(dims(engine, size), conditioning(engine, seed))
    return session


def every(num_tokens: int = TOKENS) -> Tensor:
    return torch.arange(num_tokens, dtype=torch.int32).repeat(2, 1)


def some() -> Tensor:
    return torch.tensor([[1, 5, 63], [0, 5, 40]], dtype=torch.int32)


def caches_of(session: StepSession) -> list[Tensor]:
    """As the last step left them."""
    return cache_sets_of(session)[session._steps % session.num_cache_sets]


def cache_sets_of(session: StepSession) -> list[list[Tensor]]:
    caches: Any = session._caches  # type: ignore[attr-defined]
    sets = caches if isinstance(caches, list) and isinstance(caches[0], dict) else [caches]
    return [list(caches.values()) if isinstance(caches, dict) else caches for caches in sets]


def addresses_of(session: StepSession) -> list[int]:
    return [cache.data_ptr() for caches in cache_sets_of(session) for cache in caches]


def test_a_step_before_an_image_was_begun(engine: StepEngine) -> None:
    session = engine.session()
    with pytest.raises(EngineError, match="before an image was begun"):
        session.step(latents(engine), 500.0, every())
    session = begun(engine)
    session.step(latents(engine), 500.0, every())
    session.reset()
    with pytest.raises(EngineError, match="before an image was begun"):
        session.step(latents(engine), 500.0, every())


def test_a_pruned_step_before_a_full_one(engine: StepEngine) -> None:
    session = begun(engine)
    with pytest.raises(EngineError, match=r"must compute all 64 tokens, but was given 3.*full step first"):
        session.step(latents(engine), 500.0, some())
    session.step(latents(engine), 500.0, every())
    session.step(latents(engine), 400.0, some())
    session.begin(dims(engine), conditioning(engine))
    with pytest.raises(EngineError, match="full step first"):
        session.step(latents(engine), 500.0, some())


def test_a_new_shape_needs_a_new_image(engine: StepEngine) -> None:
    session = begun(engine)
    session.step(latents(engine), 500.0, every())
    with pytest.raises(ShapeError, match=r"hidden_states has shape \(2, 4, 16, 24\), expected \(2, 4, 16, 16\)"):
        session.step(latents(engine, size=(16, 24)), 400.0, some())
    session.begin(dims(engine, (16, 24)), conditioning(engine))
    with pytest.raises(EngineError, match="must compute all 96 tokens"):
        session.step(latents(engine, size=(16, 24)), 400.0, some())
    session.step(latents(engine, size=(16, 24)), 400.0, every(96))


def test_a_pruned_step_changes_the_kept_tokens_only(engine: StepEngine) -> None:
    session = begun(engine)
    before = engine.family.noise_tokens(session.step(latents(engine), 500.0, every()))
    after = engine.family.noise_tokens(session.step(latents(engine, seed=1), 400.0, some()))
    changed = (before != after).any(dim=-1)
    expected = torch.zeros(2, TOKENS, dtype=torch.bool).scatter(1, some().long(), True)
    assert torch.equal(changed, expected)


def test_a_step_of_no_tokens_computes_nothing(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps after it are what they are without it, with two sets of caches in turn too."""
    none = torch.empty(2, 0, dtype=torch.int32)
    with pytest.raises(EngineError, match="must compute all 64 tokens, but was given 0"):
        begun(engine).step(latents(engine), 500.0, none)
    with_it, without = begun(engine), begun(engine)
    noise = with_it.step(latents(engine), 500.0, every())
    without.step(latents(engine), 500.0, every())
    with monkeypatch.context() as patch:
        patch.setattr(with_it, "_run", None)
        assert torch.equal(with_it.step(latents(engine, seed=1), 450.0, none), noise)
    assert with_it.computed.shape == (2, 0)
    for session in (with_it, without):
        session.step(latents(engine, seed=2), 400.0, some())
    expected = without.step(latents(engine, seed=3), 300.0, every())
    assert torch.equal(with_it.step(latents(engine, seed=3), 300.0, every()), expected)
    assert torch.equal(with_it.computed, every())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder_hidden_states", (2, 48, 100)),
        ("encoder_hidden_states", (2, 47, 24)),
        ("pooled_projections", (1, 20)),
        ("layer_gates", (5,)),
    ],
)
def test_shapes_that_do_not_fit(engine: StepEngine, name: str, shape: tuple[int, ...]) -> None:
    session = engine.session()
    with pytest.raises(ShapeError, match=f"{name} has shape"):
        session.begin(dims(engine), conditioning(engine) | {name: torch.zeros(shape)})
    with pytest.raises(EngineError, match="before an image was begun"):
        session.step(latents(engine), 500.0, every())


def test_the_conditioning_and_the_timestep_count(engine: StepEngine) -> None:
    noise = begun(engine).step(latents(engine), 500.0, every())
    assert torch.equal(noise, begun(engine).step(latents(engine), 500.0, every()))
    assert not torch.allclose(noise, begun(engine, seed=1).step(latents(engine), 500.0, every()), atol=1e-3)
    assert not torch.allclose(noise, begun(engine).step(latents(engine), 400.0, every()), atol=1e-3)


def test_caches_are_allocated_once_and_updated(engine: StepEngine) -> None:
    session = begun(engine)
    session.step(latents(engine), 500.0, every())
    addresses = addresses_of(session)
    assert len(set(addresses)) == 2 * engine.family.config["num_layers"] * session.num_cache_sets
    for seed, keep_indices in ((1, some()), (2, every()), (3, some())):
        if seed == 2:  # the memory is kept for the next image of its shape
            session.begin(dims(engine), conditioning(engine, seed))
        before = [cache.clone() for cache in caches_of(session)]
        session.step(latents(engine, seed), 500.0 - seed, keep_indices)
        assert addresses_of(session) == addresses
        rows = torch.zeros(2, TOKENS + 48, dtype=torch.bool).scatter(1, keep_indices.long(), True)
        rows[:, TOKENS:] = True  # the text is computed on every step
        for old, new in zip(before, caches_of(session), strict=True):
            assert torch.equal((old != new).any(dim=-1), rows)


def test_the_last_noise_is_left_as_it_is(engine: StepEngine) -> None:
    """The selection and schedulers of higher order keep it."""
    session = begun(engine)
    first = session.step(latents(engine), 500.0, every())
    copy = first.clone()
    second = session.step(latents(engine, seed=1), 400.0, some())
    assert torch.equal(first, copy)
    assert not torch.equal(first, second)


def test_a_failure_resets_the_session(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = begun(engine)
    expected = session.step(latents(engine), 500.0, every()).clone()
    with monkeypatch.context() as patch:
        patch.setattr(session, "_run", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.step(latents(engine, seed=1), 400.0, every())
    with pytest.raises(EngineError, match="before an image was begun"):
        session.step(latents(engine), 400.0, some())
    session.begin(dims(engine), conditioning(engine))
    torch.testing.assert_close(session.step(latents(engine), 500.0, every()), expected)


@pytest.mark.parametrize("method", ["_allocate", "_begin"])
def test_an_image_that_failed_to_begin_leaves_nothing_behind(
    engine: StepEngine, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = begun(engine)
    expected = session.step(latents(engine), 500.0, every()).clone()
    original = getattr(session, method)

    def fails(*arguments: Any) -> None:
        original(*arguments)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(session, method, fails)
        with pytest.raises(MemoryError):
            session.begin(dims(engine, (16, 24)), conditioning(engine))
    with pytest.raises(EngineError, match="before an image was begun"):
        session.step(latents(engine), 500.0, every())
    session.begin(dims(engine), conditioning(engine))
    torch.testing.assert_close(session.step(latents(engine), 500.0, every()), expected)


def test_sessions_are_independent(engine: StepEngine) -> None:
    alone = begun(engine)
    alone.step(latents(engine), 500.0, every())
    expected = alone.step(latents(engine, seed=1), 400.0, some())
    one, other = begun(engine), begun(engine, seed=7)
    one.step(latents(engine), 500.0, every())
    other.step(latents(engine, seed=7), 900.0, every())
    other.step(latents(engine, seed=8), 800.0, some())
    torch.testing.assert_close(one.step(latents(engine, seed=1), 400.0, some()), expected, rtol=0, atol=1e-6)


def test_tensors_that_are_not_contiguous(engine: StepEngine) -> None:
    def strided(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]

    inputs = {name: strided(tensor) for name, tensor in conditioning(engine).items()}
    keep_indices = torch.stack([every()[0]] * 2, dim=1).t()
    assert not any(tensor.is_contiguous() for tensor in (*inputs.values(), strided(latents(engine)), keep_indices))
    session = engine.session()
    session.begin(dims(engine), inputs)
    expected = begun(engine).step(latents(engine), 500.0, every())
    actual = session.step(strided(latents(engine)), 500.0, keep_indices)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_the_users_conditioning_may_go(engine: StepEngine) -> None:
    """ONNX Runtime reads the bound memory on every step, so the session keeps it."""
    expected = begun(engine).step(latents(engine), 500.0, every())
    session, given = engine.session(), conditioning(engine)
    session.begin(dims(engine), given)
    shapes = [tensor.shape for tensor in given.values()]
    del given
    _reused = [torch.full(shape, 1e6) for shape in shapes for _ in range(20)]
    torch.testing.assert_close(session.step(latents(engine), 500.0, every()), expected, rtol=0, atol=1e-6)


def test_onnx_runtime_does_not_compute_in_bf16(mini_bundle: Path) -> None:
    manifest = Bundle.open(mini_bundle).manifest
    family = family_named(manifest.family, manifest.transformer_config)
    with pytest.raises(EngineError, match=r"does not compute in bfloat16; export with --dtype fp32"):
        OnnxRuntimeStepEngine(mini_bundle, family, torch.bfloat16)


@pytest.mark.parametrize("name", ["prompt.onnx", "timestep.onnx", "step.onnx"])
def test_onnx_runtime_cannot_load_a_file(mini_bundle: Path, tmp_path: Path, name: str) -> None:
    manifest = Bundle.open(mini_bundle).manifest
    family = family_named(manifest.family, manifest.transformer_config)
    for path in mini_bundle.glob("*.onnx*"):
        shutil.copyfile(path, tmp_path / path.name)
    damaged = tmp_path / name
    for content in (b"", b"no model"):
        damaged.write_bytes(content)
        with pytest.raises(EngineError, match=rf"cannot load .*{name}"):
            OnnxRuntimeStepEngine(tmp_path, family, torch.float32)
    damaged.unlink()
    with pytest.raises(EngineError, match=rf"cannot load .*{name}"):
        OnnxRuntimeStepEngine(tmp_path, family, torch.float32)


def test_onnx_runtime_fails_in_a_step(engines: dict[str, StepEngine]) -> None:
    engine = engines["onnxruntime"]
    session = begun(engine)
    session.step(latents(engine), 500.0, every())
    out_of_range = torch.full((2, 3), 10_000, dtype=torch.int32)
    with pytest.raises(EngineError, match="ONNX Runtime failed in a step"):
        session.step(latents(engine), 400.0, out_of_range)
    session.begin(dims(engine), conditioning(engine))
    session.step(latents(engine), 500.0, every())


def test_onnx_runtime_fails_in_a_small_graph(engines: dict[str, StepEngine]) -> None:
    engine = engines["onnxruntime"]
    assert isinstance(engine, OnnxRuntimeStepEngine)
    inputs = conditioning(engine) | {"encoder_hidden_states": torch.zeros(2, 48, 100)}
    with pytest.raises(EngineError, match=r"ONNX Runtime failed in prompt\.onnx"):
        engine.run(Part.PROMPT, inputs)
