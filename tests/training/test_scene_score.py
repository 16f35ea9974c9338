import numpy as np
import pytest
from scene_score import scene_score, thing_masks
from scenes import COLORS, GROUNDS, SHAPES, Scene, Thing, render, sample_scene

RED_STAR = Scene((Thing("large", "red", "star"),), "in the center", "gray", False)


@pytest.fixture(scope="module")
def rendered():
    rng = np.random.default_rng(11)
    scenes = [sample_scene(rng) for _ in range(100)]
    return scenes, [render(scene, rng=rng) for scene in scenes]


def mean_score(images, scenes):
    return np.mean([scene_score(image, scene) for image, scene in zip(images, scenes, strict=True)])


def test_real_renderings_score_high(rendered):
    scenes, images = rendered
    # Measured 0.85 to 0.87 on sets of 100; the standard error is 0.01.
    assert mean_score(images, scenes) > 0.81


def test_renderings_of_other_captions_score_low(rendered):
    scenes, images = rendered
    # Measured 0.06 to 0.10 on sets of 100; the standard error is 0.02.
    assert mean_score(images, scenes[1:] + scenes[:1]) < 0.16


def test_the_score_of_a_seed_is_fixed():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(300)]
    images = [render(scene, rng=rng) for scene in scenes[:100]]
    # From the script that scored the first miniature; Pillow's antialiasing may move single pixels.
    assert mean_score(images, scenes[:100]) == pytest.approx(0.8542040326210515, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rendering_without_jitter_is_nearly_perfect(shape):
    scene = Scene((Thing("large", "red", shape),), "in the center", "gray", False)
    # What is missing from 1 is the antialiased edge; the star has the longest.
    assert scene_score(render(scene), scene) > 0.9


def test_an_empty_background_scores_zero():
    image = np.full((128, 128, 3), GROUNDS["gray"], dtype=np.uint8)
    assert scene_score(image, RED_STAR) == 0.0


def test_the_colour_everywhere_is_no_star():
    image = np.full((128, 128, 3), COLORS["red"], dtype=np.uint8)
    (_, mask, _), *_ = thing_masks(RED_STAR)
    assert scene_score(image, RED_STAR) == pytest.approx(mask.sum() / (2 * int(128 * 0.27)) ** 2, abs=0.05)


def test_each_aspect_of_a_thing_counts():
    image = render(RED_STAR)
    for wrong in (
        Scene((Thing("large", "blue", "star"),), "in the center", "gray", False),
        Scene((Thing("large", "red", "circle"),), "in the center", "gray", False),
        Scene((Thing("small", "red", "star"),), "in the center", "gray", False),
        Scene((Thing("large", "red", "star"),), "on the left", "gray", False),
    ):
        assert scene_score(image, wrong) < scene_score(image, RED_STAR) - 0.3, wrong
