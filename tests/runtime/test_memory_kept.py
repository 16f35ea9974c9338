"""What is kept from image to image, so that captured steps are replayed, and what is let go of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

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
