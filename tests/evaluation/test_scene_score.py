import numpy as np
import pytest
from cat_pruning.evaluation.scene_score import coverage_score, scene_score, thing_masks
from cat_pruning.evaluation.scenes import COLORS, GROUNDS, SHAPES, Scene, Thing, render, render_ground, sample_scene

RED_STAR = Scene((Thing("large", "red", "star"),), "in the center", "gray", False)


@pytest.fixture(scope="module")
def rendered():
    rng = np.random.default_rng(11)
    scenes = [sample_scene(rng) for _ in range(100)]
    return scenes, [render(scene, rng=rng) for scene in scenes]


def mean_score(images, scenes, score=scene_score):
    return np.mean([score(image, scene) for image, scene in zip(images, scenes, strict=True)])


def test_real_renderings_score_high(rendered):
    scenes, images = rendered
    # Measured 0.85 to 0.87 on sets of 100; the standard error is 0.01.
    assert mean_score(images, scenes) > 0.81


def test_renderings_of_other_captions_score_low(rendered):
    scenes, images = rendered
    # Measured 0.06 to 0.10 on sets of 100; the standard error is 0.02.
    assert mean_score(images, scenes[1:] + scenes[:1]) < 0.16


def test_coverage_of_real_renderings_is_nearly_perfect(rendered):
    scenes, images = rendered
    # Measured 0.957 on 48; the standard error is 0.003.
    assert mean_score(images, scenes, coverage_score) > 0.94
    assert mean_score(images, scenes[1:] + scenes[:1], coverage_score) < 0.14


@pytest.mark.parametrize(("color", "ground"), [("green", "teal"), ("white", "beige")])
@pytest.mark.parametrize("striped", [False, True])
def test_coverage_tells_a_colour_from_a_ground_near_it(color, ground, striped):
    scene = Scene((Thing("large", color, "star"),), "in the center", ground, striped)
    assert coverage_score(render(scene), scene) > 0.95
    assert coverage_score(render_ground(scene), scene) < 0.05
    if not striped:
        assert scene_score(render(scene), scene) < 0.5


def test_the_score_of_a_seed_is_fixed():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(300)]
    images = [render(scene, rng=rng) for scene in scenes[:100]]
    # From the script that scored the first miniature; Pillow's antialiasing may move single pixels.
    assert mean_score(images, scenes[:100]) == pytest.approx(0.8542040326210515, abs=1e-3)


@pytest.mark.parametrize("color", COLORS)
def test_coverage_counts_no_other_colour(color):
    image = render(Scene((Thing("large", color, "circle"),), "in the center", "black", False))
    for other in COLORS:
        scene = Scene((Thing("large", other, "circle"),), "in the center", "black", False)
        assert (coverage_score(image, scene) > 0.5) == (other == color), (color, other)


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


@pytest.mark.parametrize("score", [scene_score, coverage_score])
def test_each_aspect_of_a_thing_counts(score):
    image = render(RED_STAR)
    for wrong in (
        Scene((Thing("large", "blue", "star"),), "in the center", "gray", False),
        Scene((Thing("large", "red", "circle"),), "in the center", "gray", False),
        Scene((Thing("small", "red", "star"),), "in the center", "gray", False),
        Scene((Thing("large", "red", "star"),), "on the left", "gray", False),
    ):
        assert score(image, wrong) < score(image, RED_STAR) - 0.3, wrong
