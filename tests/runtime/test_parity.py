"""The acceptance tests: the drop-in against the untouched pipeline, and the engines against each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cat_pruning.engines.step_engine import StepEngine

# The bundle's profile, and two other sizes, which go wrong within few steps, as rounding does in many; the graph was
# traced at none.
STEPS = {(128, 128): 28, (96, 160): 10, (160, 128): 10}
ENGINES = ("onnxruntime", "torch")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, mini_engines: dict[str, StepEngine]) -> StepEngine:
    """Each engine of sd3-mini in turn."""
    return mini_engines[request.param]


@pytest.fixture(scope="module")
def untouched(mini_pipelines: Callable[..., Any], sample: Callable[..., Any]) -> Callable[[tuple[int, int]], Any]:
    """An image of the untouched pipeline, made once. Read only."""
    return functools.cache(lambda size: sample(mini_pipelines(), STEPS[size], size))


@pytest.fixture(scope="module")
def pruned(
    mini_engines: dict[str, StepEngine], mini_drop_in: Callable[..., Any], sample: Callable[..., Any]
) -> Callable[[str, tuple[int, int]], Any]:
    """A pruned image by an engine, made once. Read only."""
    return functools.cache(
        lambda name, size: sample(mini_drop_in(mini_engines[name], keep_ratio=0.3), STEPS[size], size)
    )


@pytest.mark.long
@pytest.mark.parametrize("size", STEPS)
def test_keeping_every_token_is_the_untouched_pipeline(
    engine: StepEngine,
    size: tuple[int, int],
    untouched: Callable[[tuple[int, int]], Any],
    mini_drop_in: Callable[..., Any],
    sample: Callable[..., Any],
) -> None:
    expected, steps = untouched(size), STEPS[size]
    actual = sample(mini_drop_in(engine, keep_ratio=1.0), steps, size)
    assert actual.kinds == "F" * 8 + "P" * (steps - 8)
    assert len(actual.latents) == len(expected.latents) == steps
    for step, (mine, theirs) in enumerate(zip(actual.latents, expected.latents, strict=True)):
        # The latents are of order 1; fp32 sums in another order leave a few 1e-6 after 28 steps.
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4, msg=lambda m, step=step: f"step {step}: {m}")


@pytest.mark.long
@pytest.mark.parametrize("size", STEPS)
def test_the_engines_agree_on_tokens_and_latents(
    size: tuple[int, int], pruned: Callable[[str, tuple[int, int]], Any]
) -> None:
    ort, reference = (pruned(name, size) for name in ENGINES)
    assert ort.kinds == "F" * 8 + "P" * (STEPS[size] - 8)
    assert {record.num_kept for record in ort.records[8:]} == {int(0.3 * ort.records[0].num_tokens)}
    for mine, theirs in zip(ort.records, reference.records, strict=True):
        assert torch.equal(mine.keep_indices, theirs.keep_indices), f"step {mine.step} computes other tokens"
    torch.testing.assert_close(ort.final, reference.final, rtol=0, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", ENGINES)
def test_pruning_changes_the_image_but_not_much(
    name: str, untouched: Callable[[tuple[int, int]], Any], pruned: Callable[[str, tuple[int, int]], Any]
) -> None:
    """Guards the tests above: a drop-in that never prunes would pass most of them."""
    full = untouched((128, 128))
    difference = (pruned(name, (128, 128)).final - full.final).square().mean() / full.final.square().mean()
    assert 1e-5 < difference < 0.5
