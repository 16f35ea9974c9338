import hashlib
import itertools
import json

import numpy as np
import pytest

from cat_pruning.errors import SettingsError
from cat_pruning.models import prompts, rich_scenes
from cat_pruning.models.prompts import MAX_SCENES, Prompt, load_prompts, located, parse_caption, unseen_scenes
from cat_pruning.models.scenes import (
    COLORS,
    PAIRS,
    SHAPES,
    SINGLE,
    SIZES,
    Scene,
    Thing,
    is_held_out,
    sample_scene,
)

CAPTION = "a large red circle left of a small blue star on a plain black background"
RED_AND_BLUE = Scene((Thing("large", "red", "circle"), Thing("small", "blue", "star")), "left of", "black", False)


def texts(source, limit=None):
    return [prompt.text for prompt in load_prompts(str(source), limit)]


def written(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.long
def test_scenes_are_unseen_and_distinct():
    loaded = load_prompts("scenes:48")
    assert len({prompt.text for prompt in loaded}) == 48
    assert all(prompt.scene.caption == prompt.text and is_held_out(prompt.scene) for prompt in loaded)
    assert not prompts._first_captions() & {prompt.text for prompt in loaded}


def test_scenes_are_those_that_the_miniatures_were_scored_on():
    digest = hashlib.sha256("".join(texts("scenes:48")).encode()).hexdigest()
    assert digest[:16] == "0740f52037211c02"


def test_rich_scenes_are_held_out_distinct_and_read_back():
    loaded = load_prompts("rich:8")
    assert len({prompt.text for prompt in loaded}) == 8
    assert all(rich_scenes.is_held_out(prompt.scene) for prompt in loaded)
    assert [rich_scenes.parse_caption(prompt.text) for prompt in loaded] == [prompt.scene for prompt in loaded]
    assert load_prompts("rich:12", limit=3) == loaded[:3]


@pytest.mark.parametrize("source", ["rich:0", "rich:x", "rich:"])
def test_a_number_of_rich_scenes_that_is_none_is_refused(source):
    with pytest.raises(SettingsError, match=f"{source}: expected rich:N with a whole number N from 1 to 5000"):
        load_prompts(source)


def test_a_rich_caption_in_a_file_has_its_scene(tmp_path):
    prompt = load_prompts("rich:1")[0]
    assert load_prompts(str(written(tmp_path, "one.txt", prompt.text))) == [prompt]


def test_fewer_scenes_are_the_first_of_more():
    many = load_prompts("scenes:12")
    assert load_prompts("scenes:5") == load_prompts("scenes:12", limit=5) == many[:5]


@pytest.mark.parametrize("source", ["scenes:0", "scenes:x", "scenes:", "scenes:-3", "scenes:1.5", "scenes:²"])
def test_a_number_of_scenes_that_is_none_is_refused(source):
    with pytest.raises(SettingsError, match=f"{source}: expected scenes:N with a whole number N from 1 to 5000"):
        load_prompts(source)


def test_more_scenes_than_there_are_is_refused():
    with pytest.raises(SettingsError, match="scenes:5001"):
        load_prompts(f"scenes:{MAX_SCENES + 1}")
    with pytest.raises(SettingsError, match="at most 5000"):
        unseen_scenes(MAX_SCENES + 1, np.random.default_rng(0))


def test_there_are_more_unseen_scenes_than_may_be_asked_for():
    things = [Thing(*words) for words in itertools.product(SIZES, COLORS, SHAPES)]
    pairs = itertools.permutations(things, 2)
    # On one background of ten; counted over all there are 8,263.
    scenes = [Scene(pair, place, "teal", False) for pair in pairs for place in PAIRS]
    unseen = [scene for scene in scenes if is_held_out(scene) and scene.caption not in prompts._first_captions()]
    assert 10 * len(unseen) > 1.4 * MAX_SCENES


def test_lines_of_a_text_file(tmp_path):
    file = written(tmp_path, "prompts.txt", f"\ufeffa lighthouse in a storm\n\n  \n{CAPTION}  \r\na café\n")
    assert load_prompts(str(file)) == [
        Prompt(text="a lighthouse in a storm", scene=None),
        Prompt(text=CAPTION, scene=RED_AND_BLUE),
        Prompt(text="a café", scene=None),
    ]
    assert texts(file, limit=2) == ["a lighthouse in a storm", CAPTION]
    assert len(texts(file, limit=7)) == 3


def test_a_line_ends_where_its_author_ended_it(tmp_path):
    """And not at a separator of lines or pages within a text."""
    file = written(tmp_path, "prompts.txt", "one\u2028prompt\x0b\r\ntwo\x85prompts\rthree\n")
    assert texts(file) == ["one\u2028prompt", "two\x85prompts", "three"]


def test_a_table_may_begin_with_empty_lines(tmp_path):
    assert texts(written(tmp_path, "a.tsv", "\n\nPrompt\tNote\n \na dog\tx\n\t\n")) == ["a dog"]


def test_parti_prompts(tmp_path):
    rows = [
        "Prompt\tCategory\tChallenge\tNote",
        "bond\tAbstract\tBasic\tof two meanings",
        'the words "Fly" on a wall\tOutdoor Scenes\tComplex\t',
        '"Fly", on a wall\tOutdoor Scenes\tComplex\t',
        "\tAbstract\tBasic\t",
    ]
    file = written(tmp_path, "PartiPrompts.TSV", "\n".join(rows) + "\n")
    assert texts(file) == ["bond", 'the words "Fly" on a wall', '"Fly", on a wall']


def test_coco_captions_are_the_first_of_every_image(tmp_path):
    annotations = [(9, "a dog\n"), (4, "a cat"), (9, "a hound"), (4, "a kitten"), (7, "a cow")]
    content = {"info": {}, "annotations": [{"image_id": image, "caption": text} for image, text in annotations]}
    assert texts(written(tmp_path, "captions.json", json.dumps(content))) == ["a dog", "a cat", "a cow"]


def test_drawbench_is_a_table_with_commas(tmp_path):
    """Its prompts have commas, quotation marks and line ends within quotation marks."""
    text = 'Prompts,Category\nA red car.,Colors\n"A sign that says ""Hi, there"", by\na road.",Text\n\n'
    file = written(tmp_path, "DrawBench.csv", text)
    texts = [prompt.text for prompt in load_prompts(str(file))]
    assert texts == ["A red car.", 'A sign that says "Hi, there", by\na road.']


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "has no prompts"),
        ("a.txt", "\n  \n", "has no prompts"),
        ("a.tsv", "", "has no prompts"),
        ("a.tsv", "Prompt\tNote\n", "has no prompts"),
        ("a.tsv", "Text\tNote\nx\ty\n", "has the columns 'Text, Note': expected one Prompt among them"),
        ("a.csv", "Prompts,Category\n", "has no prompts"),
        (
            "a.csv",
            "Prompt,Note\nx,y\n",
            "has the columns 'Prompt, Note': expected one Prompts among them, as in DrawBench",
        ),
        ("a.tsv", "Prompt\tPrompt\nx\ty\n", "expected one Prompt among them"),
        ("a.tsv", "Prompt\tNote\na\tb\n\nx\ty\tz\n", "line 4: 3 fields, and 2 columns"),
        (
            "a.csv",
            "Prompts,Category\nA dog, running,Animals\n",
            "line 2: 3 fields, and 2 columns; in a table with commas",
        ),
        ("a.csv", "Category,Prompts\nAnimals\n", "line 2: 1 fields, and 2 columns"),
        ("a.csv", 'Prompts,Category\n"A dog,Animals\nA cat,Animals\n', "is no table of comma-sep.*unexpected end"),
        ("a.csv", 'Prompts\n"A" dog\n', "is no table of comma-separated values"),
        ("a.txt", "a\0 \0s\0t\0a\0r\0", "has a character that no text has; save the file as UTF-8"),
        ("a.json", '{"annotations": [{"image_id": 1, "caption": "\\ud800"}]}', "has a character that no text has"),
        ("a.json", "", "has no prompts"),
        ("a.json", '{"annotations": []}', "has no prompts"),
        ("a.json", '["a dog"]', "is not of the form"),
        ("a.json", '{"captions": []}', "is not of the form"),
        ("a.json", '{"annotations": 3}', "is not of the form"),
        ("a.json", '{"annotations": [{"image_id": 1}]}', "is not of the form"),
        ("a.json", '{"annotations": [{"image_id": 1, "caption": 2}]}', "is not of the form"),
        ("a.json", '{"annotations": [{"image_id": [], "caption": "x"}]}', "is not of the form"),
        ("a.json", "{", "is not of the form"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, name, text, message):
    file = written(tmp_path, name, text)
    with pytest.raises(SettingsError, match=message) as caught:
        load_prompts(str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.txt cannot be read \(No such file or directory\); give a file"):
        load_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(SettingsError, match="cannot be read"):
        load_prompts(str(tmp_path))
    with pytest.raises(SettingsError, match="cannot be read"):
        load_prompts("a\0b")
    (tmp_path / "latin.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(SettingsError, match=r"latin\.txt is not UTF-8 \(byte 5\)"):
        load_prompts(str(tmp_path / "latin.txt"))


def test_a_limit_below_one_is_refused():
    with pytest.raises(SettingsError, match="limit=0"):
        load_prompts("scenes:4", limit=0)


def test_a_caption_is_read_back():
    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng) for _ in range(500)]
    scenes += [Scene((Thing("small", "pink", "ring"),), place, "teal", True) for place in SINGLE]
    assert [parse_caption(scene.caption) for scene in scenes] == scenes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        CAPTION.capitalize(),
        CAPTION + ".",
        CAPTION + "\n",
        CAPTION.replace(" ", "  ", 1),
        CAPTION.replace("left of", "right of"),
        CAPTION.replace("left of", "on the left"),
        CAPTION.replace(" a small blue star", ""),
        CAPTION.replace("black", "red"),
    ],
)
def test_what_is_no_caption_has_no_scene(text):
    assert parse_caption(text) is None


def test_a_file_is_recorded_by_its_whole_path(tmp_path, monkeypatch):
    """Because the command that a bundle tells is run from anywhere."""
    monkeypatch.chdir(tmp_path)
    assert located("prompts.txt") == str(tmp_path.resolve() / "prompts.txt")
    assert [located(source) for source in ("scenes:8", "rich:2")] == ["scenes:8", "rich:2"]
