"""What is kept from image to image, so that captured steps are replayed, and what is let go of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cat_pruning.engines import session_pool, step_engine
from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.runtime.image_in_progress import ImageInProgress
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings

TIMESTEPS = torch.linspace(1000, 1, 4)

Draw = Callable[..., ImageInProgress]


@pytest.fixture
def transformer(make_tiny: Callable[..., Any]) -> CatTransformer:
    return CatTransformer.from_model(make_tiny("sd3"), PruneSettings(full_steps=2, num_clusters=3))


@pytest.fixture
def draw(transformer: CatTransformer) -> Draw:
    """Makes an image, and returns what its sampling kept of it."""

    def image(side: int = 8) -> ImageInProgress:
        generator = torch.Generator().manual_seed(0)
        text, pooled = torch.randn(1, 5, 24, generator=generator), torch.randn(1, 20, generator=generator)
        with torch.no_grad():
            for timestep in TIMESTEPS.clone():
                latents = torch.randn(1, 4, side, side, generator=generator)
                transformer(latents, timestep=timestep, encoder_hidden_states=text, pooled_projections=pooled)
        kept = transformer._sampling().image
        assert kept is not None
        assert [kept.record and kept.record.step, len(kept.timesteps)] == [3, 4]
        return kept

    return image


def test_images_of_one_shape_have_one_selector(draw: Draw) -> None:
    """It is what a captured step is found by."""
    one, other = draw(), draw()
    assert one is not other
    assert one.selector is other.selector


def test_other_shapes_and_settings_have_another(transformer: CatTransformer, draw: Draw) -> None:
    before = draw().selector
    assert draw(side=12).selector is not before
    transformer.settings = transformer.settings.replace(fresh_fraction=0.5)
    assert draw(side=12).selector.settings.fresh_fraction == 0.5


def test_what_is_over_is_freed(draw: Draw) -> None:
    kept = draw()
    image, selector = weakref.ref(kept), weakref.ref(kept.selector)
    del kept
    draw()
    assert image() is None
    assert selector() is not None
    draw(side=12)
    assert selector() is None


@pytest.fixture(params=["torch", "onnxruntime"])
def small_engine(request: pytest.FixtureRequest, make_tiny: Callable[..., Any], export_tiny: Any) -> StepEngine:
    if request.param == "torch":
        return TorchStepEngine(make_tiny("sd3"))
    export = export_tiny("sd3")
    return OnnxRuntimeStepEngine(export.directory, export.step.family, torch.float32)


def draw_shapes(transformer: CatTransformer, *shapes: tuple[int, int, int]) -> CatTransformer:
    """An image of each shape in turn: batch, latent height and width."""
    with torch.no_grad():
        for batch, height, width in shapes:
            for timestep in TIMESTEPS.clone():
                transformer(
                    torch.ones(batch, 4, height, width),
                    timestep=timestep,
                    encoder_hidden_states=torch.ones(batch, 5, 24),
                    pooled_projections=torch.ones(batch, 20),
                )
    return transformer


def test_many_shapes_hold_what_the_last_one_does(small_engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[None] = []
    for module in (step_engine, session_pool):
        monkeypatch.setattr(module, "give_back_freed_memory", lambda: given_back.append(None))
    settings = PruneSettings(full_steps=2, num_clusters=3)
    shapes = [(1 + index % 3, 8 + 2 * (index % 5), 8 + 2 * (index % 4)) for index in range(10)]
    every = draw_shapes(CatTransformer(small_engine, settings), *shapes, (2, 8, 8), (2, 8, 8))
    assert len(given_back) == 11  # once a change of shape
    last = draw_shapes(CatTransformer(small_engine, settings), (2, 8, 8))
    assert (every.sessions.num_sessions, every.sessions.num_bytes) == (1, last.sessions.num_bytes)
    assert last.sessions.num_bytes > 0
    every.release()
    assert len(given_back) == 13
    assert every.sessions.num_bytes == 0


def test_graphs_on_a_processor_keep_no_activations(export_tiny: Any) -> None:
    export = export_tiny("sd3")
    engine = OnnxRuntimeStepEngine(export.directory, export.step.family, torch.float32)
    assert [graph.get_session_options().enable_cpu_mem_arena for graph in engine.graphs.values()] == [False] * 3
