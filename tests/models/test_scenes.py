import hashlib
import itertools

import numpy as np
import pytest

from cat_pruning.models.scenes import (
    COLORS,
    GROUNDS,
    PAIRS,
    SHAPES,
    SINGLE,
    SIZES,
    Scene,
    Thing,
    is_held_out,
    render,
    sample_scene,
    vocabulary,
)


def sampled(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def test_the_same_seed_gives_the_data_set_that_the_published_weights_saw():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(300)]
    captions = "".join(scene.caption for scene in scenes)
    assert hashlib.sha256(captions.encode()).hexdigest()[:16] == "1b63179a79ca250e"


def test_rendering_is_a_function_of_scene_and_generator():
    scene = sampled(1, seed=3)[0]
    first, second, other = (render(scene, rng=np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert first.shape == (128, 128, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert np.array_equal(render(scene), render(scene))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_colour_around_its_place(shape):
    scene = Scene((Thing("large", "red", shape),), "on the left", "black", False)
    near_red = (np.abs(render(scene).astype(int) - COLORS["red"]) < 8).all(-1)
    rows, columns = np.nonzero(near_red)
    x, y = SINGLE["on the left"]
    # A triangle's and a star's bounding boxes are off center by a few percent of the radius; 6 px allow for it.
    assert abs((columns.min() + columns.max()) / 2 - x * 128) < 6
    assert abs((rows.min() + rows.max()) / 2 - y * 128) < 6
    assert near_red.sum() > 0.25 * np.pi * (SIZES["large"] * 128) ** 2


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="blob"):
        render(Scene((Thing("large", "red", "blob"),), "on the left", "black", False))


def test_captions_and_scenes_are_one_to_one():
    things = [Thing(*parts) for parts in itertools.product(SIZES, list(COLORS)[:3], SHAPES)]
    backgrounds = list(itertools.product(GROUNDS, (False, True)))
    alone = [Scene((thing,), place, *rest) for thing in things for place in SINGLE for rest in backgrounds]
    pairs = [Scene(pair, place, "teal", True) for pair in itertools.permutations(things, 2) for place in PAIRS]
    assert len({scene.caption for scene in alone + pairs}) == len(alone) + len(pairs)


def test_captions_use_the_vocabulary_and_all_of_it():
    used = {word for scene in sampled(4000, seed=1) for word in scene.caption.split()}
    assert used == set(vocabulary())


def test_two_things_never_share_colour_and_shape():
    pairs = [scene.things for scene in sampled(4000, seed=2) if len(scene.things) == 2]
    assert pairs
    assert all((a.color, a.shape) != (b.color, b.shape) for a, b in pairs)


@pytest.mark.long
def test_a_twentieth_of_the_captions_is_held_out():
    share = np.mean([is_held_out(scene) for scene in sampled(20_000, seed=4)])
    # 0.05 +- 4 standard deviations of a binomial share, sqrt(0.05 * 0.95 / 20000) = 0.0015.
    assert abs(share - 0.05) < 0.0062
