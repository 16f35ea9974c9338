import hashlib
from itertools import pairwise

import numpy as np
import pytest

from cat_pruning.models.rich_scenes import (
    ACCENT,
    COLORS,
    COUNTS,
    PERIOD,
    PLACES,
    TEXTURES,
    RichScene,
    RichThing,
    is_held_out,
    parse_caption,
    render,
    sample_scene,
    texture_accents,
    vocabulary,
)
from cat_pruning.models.scenes import GROUNDS

THINGS = (
    RichThing("large", "striped", "red", "circle", "northwest"),
    RichThing("small", "plain", "blue", "star", "north"),
    RichThing("large", "checked", "green", "square", "middle"),
    RichThing("small", "dotted", "pink", "ring", "southeast"),
)
SCENE = RichScene(THINGS, "striped", "navy")
CAPTION = (
    "large striped red circle northwest, small plain blue star north, large checked green square middle, "
    "small dotted pink ring southeast on a striped navy background"
)


def sampled(count: int, seed: int) -> list[RichScene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def test_the_same_seed_gives_the_data_set_that_the_published_weights_saw():
    captions = "".join(scene.caption for scene in sampled(100, seed=0))
    assert hashlib.sha256(captions.encode()).hexdigest()[:16] == "13d12ef47506de6b"


def test_scenes_have_four_to_six_things_in_the_order_of_the_places():
    scenes = sampled(300, seed=1)
    assert {len(scene.things) for scene in scenes} == set(COUNTS)
    places = [[list(PLACES).index(thing.place) for thing in scene.things] for scene in scenes]
    assert all(before < after for order in places for before, after in pairwise(order))


def test_captions_use_the_vocabulary_and_all_of_it():
    used = {word for scene in sampled(500, seed=2) for word in scene.caption.replace(",", " ,").split()}
    assert used == set(vocabulary())


def test_a_caption_is_read_back():
    scenes = [SCENE, *sampled(300, seed=3)]
    assert SCENE.caption == CAPTION
    assert [parse_caption(scene.caption) for scene in scenes] == scenes


@pytest.mark.parametrize(
    "text",
    [
        "",
        CAPTION.capitalize(),
        CAPTION + ".",
        CAPTION.replace("small plain blue star north, ", ""),  # three things
        CAPTION.replace("northwest", "southwest"),  # another order
        CAPTION.replace(" north,", " northwest,"),  # two at one place
        CAPTION.replace("red", "white"),
        CAPTION.replace("navy", "red"),
        CAPTION.replace(", ", " "),
    ],
)
def test_what_is_no_caption_has_no_scene(text):
    assert text != CAPTION
    assert parse_caption(text) is None


def test_a_twentieth_of_the_captions_is_held_out():
    share = np.mean([is_held_out(scene) for scene in sampled(2000, seed=4)])
    # 0.05 +- 4 standard deviations of a binomial share, sqrt(0.05 * 0.95 / 2000) = 0.0049.
    assert abs(share - 0.05) < 0.02


def test_rendering_is_a_function_of_scene_and_generator():
    first, second, other = (render(SCENE, rng=np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert first.shape == (256, 256, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert np.array_equal(render(SCENE), render(SCENE))


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_texture_shares_a_thing_among_its_colour_and_white(texture):
    thing = RichThing("large", texture, "red", "square", "middle")
    near_red, near_white = (
        (np.abs(render(RichScene((thing,), "plain", "black")).astype(int) - rgb) < 8).all(-1)
        for rgb in (COLORS["red"], ACCENT)
    )
    white = near_white.sum() / (near_red.sum() + near_white.sum())
    expected = {"plain": 0.0, "striped": 0.5, "dotted": np.pi * 0.31**2, "checked": 0.5}[texture]
    assert white == pytest.approx(expected, abs=0.12)


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_texture_repeats_after_its_period_and_not_before(texture):
    along = np.arange(64) + 0.5
    accents = texture_accents(texture, along[None, :], along[:, None], PERIOD)
    assert np.array_equal(accents[:, PERIOD:], accents[:, :-PERIOD])
    if texture != "plain":
        assert any(not np.array_equal(accents[:, k:], accents[:, :-k]) for k in (PERIOD // 2, PERIOD // 4))
    # Stripes of a thing stand.
    assert (texture in ("plain", "striped")) == bool((accents == accents[:1]).all())


@pytest.mark.parametrize("ground", GROUNDS)
def test_a_textured_ground_shows_two_colours(ground):
    plain, checked = (render(RichScene((), texture, ground)) for texture in ("plain", "checked"))
    assert (plain == GROUNDS[ground]).all()
    share = (checked == GROUNDS[ground]).all(-1).mean()
    assert 0.3 < share < 0.6
