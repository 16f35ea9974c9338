import dataclasses

import numpy as np
import pytest

from cat_pruning.errors import ShapeError
from cat_pruning.evaluation.rich_coverage import WRONG_TEXTURE, rich_coverage
from cat_pruning.models.rich_scenes import PLACES, TEXTURES, RichScene, RichThing, render, sample_scene

RED_STAR = RichScene((RichThing("large", "plain", "red", "star", "middle"),), "dotted", "gray")


@pytest.fixture(scope="module")
def rendered():
    rng = np.random.default_rng(11)
    scenes = [sample_scene(rng) for _ in range(12)]
    return scenes, [render(scene, rng=rng) for scene in scenes]


def mean_coverage(images, scenes):
    return np.mean([rich_coverage(image, scene) for image, scene in zip(images, scenes, strict=True)])


def changed(scene, **changes):
    return dataclasses.replace(scene, things=tuple(dataclasses.replace(thing, **changes) for thing in scene.things))


def test_coverage_of_real_renderings_is_nearly_perfect(rendered):
    scenes, images = rendered
    # Measured 0.956 on 24.
    assert mean_coverage(images, scenes) > 0.93


def test_coverage_of_other_captions_is_near_chance(rendered):
    scenes, images = rendered
    # Measured 0.05 on 24.
    assert mean_coverage(images, scenes[1:] + scenes[:1]) < 0.12


def test_coverage_of_the_empty_ground_is_zero(rendered):
    scenes, _ = rendered
    grounds = [render(dataclasses.replace(scene, things=())) for scene in scenes]
    assert mean_coverage(grounds, scenes) == 0.0


@pytest.mark.parametrize("painted", TEXTURES)
@pytest.mark.parametrize("asked", TEXTURES)
def test_another_texture_counts_half(painted, asked):
    image = render(changed(RED_STAR, texture=painted))
    right = rich_coverage(image, changed(RED_STAR, texture=painted))
    assert right > 0.95
    # A plain thing has no white: what a texture leaves of it in red is less than the thing.
    share = 1.0 if painted == asked else WRONG_TEXTURE
    assert rich_coverage(image, changed(RED_STAR, texture=asked)) <= share * right + 0.02


def test_a_texture_counts_whatever_its_phase():
    scene = changed(RED_STAR, texture="striped", shape="square")
    image = render(scene).copy()
    side = slice(128 - 28, 128 + 28)
    image[side, side] = np.roll(image[side, side], 8, axis=1)  # half a period
    assert rich_coverage(image, scene) > 0.9


@pytest.mark.parametrize("changes", [{"color": "purple"}, {"shape": "ring"}, {"size": "small"}, {"place": "east"}])
def test_what_is_painted_otherwise_counts_little(changes):
    assert rich_coverage(render(changed(RED_STAR, **changes)), RED_STAR) < 0.6


def test_the_mean_is_over_the_things():
    blue = RichThing("small", "plain", "blue", "circle", "north")
    both = dataclasses.replace(RED_STAR, things=(blue, *RED_STAR.things))
    assert rich_coverage(render(RED_STAR), both) == pytest.approx(rich_coverage(render(RED_STAR), RED_STAR) / 2)


@pytest.mark.parametrize("place", PLACES)
def test_every_place_is_looked_at(place):
    scene = changed(RED_STAR, place=place)
    assert rich_coverage(render(scene, rng=np.random.default_rng(1)), scene) > 0.85


def test_an_image_that_is_not_square_is_refused():
    with pytest.raises(ShapeError, match="64x32"):
        rich_coverage(np.zeros((32, 64, 3), dtype=np.uint8), RED_STAR)
