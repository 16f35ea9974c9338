"""A ControlNet's residuals in every engine, on the graphs that take them: of each step its own, or none."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.engines.step_engine import StepEngine, StepSession
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import SettingsError
from cat_pruning.runtime.image import every_token

KINDS = ["sd3.5", "flux-dev"]
SIDE = 8  # tokens
NUM_TOKENS = SIDE**2
KEPT = 19


@pytest.fixture(params=["onnxruntime", "plugin", "function"])
def make_engine(
    request: pytest.FixtureRequest, export_tiny: Callable[..., Any], tiny_plans: Callable[..., StepEngine]
) -> Callable[[str], StepEngine]:
    """An engine of the exported graphs: ONNX Runtime's, and TensorRT's whose caches share memory or do not."""

    def make(kind: str) -> StepEngine:
        tiny = export_tiny(kind, True)
        if request.param == "onnxruntime":
            return OnnxRuntimeStepEngine(tiny.directory, tiny.step.family, torch.float32)
        return tiny_plans(tiny, (16, 16), prompts=2, token_ops=request.param)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_takes_its_own_residuals(
    make_engine: Callable[[str], StepEngine], make_tiny: Any, pipeline_call: Any, kind: str
) -> None:
    """Full and pruned, shared by blocks, by a batch, and none at all."""
    transformer = make_tiny(kind)
    call = pipeline_call(transformer, batch=2, grid=(SIDE, SIDE))
    engine, reference = make_engine(kind), TorchStepEngine(transformer)
    assert engine.takes_residuals
    sessions = [begun(each.session(), call) for each in (engine, reference)]
    count, generator = engine.family.num_residuals, torch.Generator().manual_seed(0)

    def residual(rows: int = 2) -> Tensor:
        return torch.randn(rows, NUM_TOKENS, engine.family.caches()[0].width, generator=generator)

    latents, timestep = call.arguments["hidden_states"], engine.family.max_timestep / 2
    some = torch.stack([torch.randperm(NUM_TOKENS, generator=generator)[:KEPT].sort().values for _ in range(2)])
    shared = residual()
    outputs = []
    for tokens, residuals in (
        (every_token(latents, NUM_TOKENS), [residual() for _ in range(count)]),
        (some.int(), [shared] * count),
        (some.int(), [residual(rows=1), *[None] * (count - 1)]),
        (some.int(), []),
        (every_token(latents, NUM_TOKENS), [shared] * count),
    ):
        actual, expected = (session.step(latents, timestep, tokens, residuals) for session in sessions)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        outputs.append(actual)
    assert all(not torch.allclose(one, other, atol=1e-3) for one, other in itertools.pairwise(outputs))


def begun(session: StepSession, call: Any) -> StepSession:
    dims = call.family.dims((SIDE, SIDE), batch=2, text_length=7, num_kept=KEPT)
    session.begin(dims, call.inputs())
    return session


def test_transformers_that_take_no_control_net(tiny_pixart: Any) -> None:
    with pytest.raises(SettingsError, match="--controlnet: PixArtTransformer2DModel takes no ControlNet"):
        TorchStepEngine(tiny_pixart).family.with_residuals()
