import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from cat_pruning.checkpoints.library_logs import quiet_diffusers
from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.clip_score import ClipScorer
from cat_pruning.models import miniatures

SIDE, LENGTH = 32, 20
PROMPTS = ["a large red circle", "a small blue star on a plain black background", "a ring"]


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    """A tiny random CLIPModel with sd3-mini's words."""
    from transformers import CLIPImageProcessor

    directory = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(miniatures()["sd3-mini"] / "tokenizer")
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**tiny, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    config = CLIPConfig(text_config=text, vision_config={**tiny, "image_size": SIDE, "patch_size": 8}, projection_dim=8)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # a new model's features are almost the same for every input
            torch.nn.init.normal_(parameter, std=0.5)
    torch.random.set_rng_state(generator_state)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    with quiet_diffusers():
        CLIPProcessor(image_processor=CLIPImageProcessor(**size), tokenizer=tokenizer).save_pretrained(directory)
        model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def scorer(clip_directory):
    return ClipScorer(clip_directory)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(array).resize((48, 40)) for array in pixels]


@torch.no_grad()
def cosines(directory, images, prompts):
    """[i, p], by hand."""
    with quiet_diffusers():
        model, processor = CLIPModel.from_pretrained(directory).eval(), CLIPProcessor.from_pretrained(directory)
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True)
    output = model(**inputs)
    return torch.nn.functional.cosine_similarity(output.image_embeds[:, None], output.text_embeds[None], dim=-1)


def test_it_is_a_hundred_times_the_cosine_but_not_negative(clip_directory, scorer, images):
    expected = 100 * cosines(clip_directory, images, PROMPTS)
    assert expected.min() < 0 < expected.max()  # both sides of max(..., 0) are tested
    pairs = [(i, p) for i in range(3) for p in range(3)]
    scores = scorer([images[i] for i, _ in pairs], [PROMPTS[p] for _, p in pairs])
    assert scores == pytest.approx([max(float(expected[i, p]), 0.0) for i, p in pairs], abs=1e-4)


def test_scores_do_not_depend_on_the_batch(scorer, images):
    together = scorer(images, PROMPTS)
    assert together == [scorer([image], [prompt])[0] for image, prompt in zip(images, PROMPTS, strict=True)]
    with pytest.raises(ValueError, match="shorter"):
        scorer(images, PROMPTS[:2])


def test_an_image_of_another_mode_is_scored_as_rgb(scorer, images):
    assert scorer([images[0].convert("RGBA")], PROMPTS[:1]) == scorer(images[:1], PROMPTS[:1])


def test_a_long_prompt_is_cut_and_ends_with_the_end_token(clip_directory, scorer, images):
    pairs = ["red star", "blue ring", "purple cross", "small circle", "beige left"]
    long = [" ".join([pair] * LENGTH) for pair in pairs]
    cut = [" ".join([pair] * (LENGTH // 2 - 1)) for pair in pairs]  # two tokens are those of begin and end
    expected = (100 * cosines(clip_directory, images[:1], cut)[0]).clamp(min=0).tolist()
    assert len(set(expected)) > 2  # which they would not be without the end token
    assert scorer(images[:1] * 5, long) == pytest.approx(expected, abs=1e-4)


def test_loading_says_nothing(clip_directory, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        ClipScorer(clip_directory)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere/clip cannot be loaded .*; check the network and HF_HUB_OFFLINE"):
        ClipScorer("nowhere/clip")
    with pytest.raises(SettingsError, match="expected a directory with a CLIPModel, or the id of one on the hub"):
        ClipScorer(tmp_path / "none")
    with pytest.raises(SettingsError, match=r"the CLIP model \S+ has no \*\.safetensors weights; download or convert"):
        ClipScorer(tmp_path)


def test_another_model_is_refused():
    with pytest.raises(SettingsError, match="is a model of type 'clip_text_model': expected a CLIPModel"):
        ClipScorer(miniatures()["sd3-mini"] / "text_encoder")


@pytest.mark.parametrize("missing", ["tokenizer.json", "processor_config.json", "model.safetensors", "config.json"])
def test_a_model_without_one_of_its_files_is_refused(clip_directory, tmp_path, missing):
    for file in clip_directory.iterdir():
        if file.name != missing:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(SettingsError, match=r"cannot be loaded|has no tokenizer|has no \*\.safetensors") as caught:
        ClipScorer(tmp_path)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(clip_directory, tmp_path):
    from safetensors.torch import load_file

    for file in clip_directory.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    torch.save(load_file(clip_directory / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(SettingsError, match=r"has no \*\.safetensors weights, only pickled ones \(pytorch_mod"):
        ClipScorer(tmp_path)


def test_a_model_that_lacks_weights_is_refused(clip_directory, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in clip_directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    weights = load_file(clip_directory / "model.safetensors")
    del weights["visual_projection.weight"]
    (tmp_path / "model.safetensors").unlink()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingsError, match=r"lacks weights: visual_projection\.weight"):
        ClipScorer(tmp_path)
