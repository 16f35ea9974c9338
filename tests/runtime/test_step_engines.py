"""What every step engine promises, on each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cat_pruning.engines.bundle import Bundle
from cat_pruning.errors import EngineError, ShapeError
from cat_pruning.exporter.families import family_named
from cat_pruning.runtime.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.runtime.step_engine import StepEngine, StepSession

TOKENS = 64  # of latents of 16 x 16


def inputs(engine: StepEngine, seed: int = 0, size: tuple[int, int] = (16, 16)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = engine.config
    return {
        "hidden_states": torch.randn(2, config["in_channels"], *size, generator=generator),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": torch.randn(2, 48, config["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(2, config["pooled_projection_dim"], generator=generator),
    }


def every(num_tokens: int = TOKENS) -> Tensor:
    return torch.arange(num_tokens, dtype=torch.int32).repeat(2, 1)


def some() -> Tensor:
    return torch.tensor([[1, 5, 63], [0, 5, 40]], dtype=torch.int32)


def caches_of(session: StepSession) -> list[Tensor]:
    caches: Any = session._caches  # type: ignore[attr-defined]
    return list(caches.values()) if isinstance(caches, dict) else caches


def test_a_pruned_step_before_a_full_one(engine: StepEngine) -> None:
    session = engine.session()
    with pytest.raises(EngineError, match=r"must compute all 64 tokens, but was given 3.*full step first"):
        session.step(inputs(engine), some())
    session.step(inputs(engine), every())
    session.step(inputs(engine), some())
    session.reset()
    with pytest.raises(EngineError, match="full step first"):
        session.step(inputs(engine), some())


def test_a_new_shape_needs_a_full_step(engine: StepEngine) -> None:
    session = engine.session()
    session.step(inputs(engine), every())
    with pytest.raises(EngineError, match="must compute all 96 tokens"):
        session.step(inputs(engine, size=(16, 24)), some())


def test_a_pruned_step_changes_the_kept_tokens_only(engine: StepEngine) -> None:
    session = engine.session()
    before = engine.family.patchify(session.step(inputs(engine), every()), engine.config)
    after = engine.family.patchify(session.step(inputs(engine, seed=1), some()), engine.config)
    changed = (before != after).any(dim=-1)
    expected = torch.zeros(2, TOKENS, dtype=torch.bool).scatter(1, some().long(), True)
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("hidden_states", (2, 5, 16, 16)),
        ("timestep", (1,)),
        ("encoder_hidden_states", (2, 48, 100)),
        ("pooled_projections", (1, 192)),
    ],
)
def test_shapes_that_do_not_fit(engine: StepEngine, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=f"{name} has shape"):
        engine.session().step(inputs(engine) | {name: torch.zeros(shape)}, every())


def test_caches_are_allocated_once_and_updated_in_place(engine: StepEngine) -> None:
    session = engine.session()
    session.step(inputs(engine), every())
    addresses = [cache.data_ptr() for cache in caches_of(session)]
    assert len(set(addresses)) == 2 * engine.config["num_layers"]
    for seed, keep_indices in ((1, some()), (2, every()), (3, some())):
        if seed == 2:
            session.reset()  # the memory is kept for the next image of its shape
        before = [cache.clone() for cache in caches_of(session)]
        session.step(inputs(engine, seed), keep_indices)
        assert [cache.data_ptr() for cache in caches_of(session)] == addresses
        rows = torch.zeros(2, TOKENS + 48, dtype=torch.bool).scatter(1, keep_indices.long(), True)
        rows[:, TOKENS:] = True  # the text is computed on every step
        for old, new in zip(before, caches_of(session), strict=True):
            assert torch.equal((old != new).any(dim=-1), rows)


def test_the_last_noise_is_left_as_it_is(engine: StepEngine) -> None:
    """The selection and schedulers of higher order keep it."""
    session = engine.session()
    first = session.step(inputs(engine), every())
    copy = first.clone()
    session.step(inputs(engine, seed=1), some())
    assert torch.equal(first, copy)


def test_a_failure_resets_the_session(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = engine.session()
    expected = session.step(inputs(engine), every()).clone()
    with monkeypatch.context() as patch:
        patch.setattr(session, "_run", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.step(inputs(engine, seed=1), every())
    with pytest.raises(EngineError, match="full step first"):
        session.step(inputs(engine), some())
    torch.testing.assert_close(session.step(inputs(engine), every()), expected)


def test_a_failed_allocation_leaves_nothing_half_allocated(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = engine.session()
    expected = session.step(inputs(engine), every()).clone()
    allocate = session._allocate

    def fails(dims: Any) -> None:
        allocate(dims)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(session, "_allocate", fails)
        with pytest.raises(MemoryError):
            session.step(inputs(engine, size=(16, 24)), every(96))
    torch.testing.assert_close(session.step(inputs(engine), every()), expected)


def test_sessions_are_independent(engine: StepEngine) -> None:
    alone = engine.session()
    alone.step(inputs(engine), every())
    expected = alone.step(inputs(engine, seed=1), some())
    one, other = engine.session(), engine.session()
    one.step(inputs(engine), every())
    other.step(inputs(engine, seed=7), every())
    other.step(inputs(engine, seed=8), some())
    torch.testing.assert_close(one.step(inputs(engine, seed=1), some()), expected, rtol=0, atol=1e-6)


def test_tensors_that_are_not_contiguous(engine: StepEngine) -> None:
    plain = inputs(engine)
    strided = {name: tensor.repeat_interleave(2, dim=-1)[..., ::2] for name, tensor in plain.items()}
    strided["timestep"] = torch.tensor(500.0).expand(2)
    keep_indices = torch.stack([every()[0]] * 2, dim=1).t()
    assert not any(tensor.is_contiguous() for tensor in (*strided.values(), keep_indices))
    torch.testing.assert_close(
        engine.session().step(strided, keep_indices), engine.session().step(plain, every()), rtol=0, atol=1e-6
    )


def test_onnx_runtime_does_not_compute_in_bf16(mini_bundle: Path) -> None:
    manifest = Bundle.open(mini_bundle).manifest
    family = family_named(manifest.family)
    with pytest.raises(EngineError, match=r"does not compute in bfloat16; export with --dtype fp32"):
        OnnxRuntimeStepEngine(mini_bundle / "step.onnx", family, manifest.transformer_config, torch.bfloat16)


def test_onnx_runtime_cannot_load_a_file(mini_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(mini_bundle).manifest
    family = family_named(manifest.family)
    damaged = tmp_path / "step.onnx"
    for content in (b"", b"no model"):
        damaged.write_bytes(content)
        with pytest.raises(EngineError, match="cannot load"):
            OnnxRuntimeStepEngine(damaged, family, manifest.transformer_config, torch.float32)
    with pytest.raises(EngineError, match="cannot load"):
        OnnxRuntimeStepEngine(tmp_path / "nowhere.onnx", family, manifest.transformer_config, torch.float32)


def test_onnx_runtime_fails_in_a_step(engines: dict[str, StepEngine]) -> None:
    engine = engines["onnxruntime"]
    session = engine.session()
    session.step(inputs(engine), every())
    out_of_range = torch.full((2, 3), 10_000, dtype=torch.int32)
    with pytest.raises(EngineError, match="ONNX Runtime failed in a step"):
        session.step(inputs(engine), out_of_range)
    session.step(inputs(engine), every())
