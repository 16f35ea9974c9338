"""The packaged sd3-mini-256: 1,024 tokens, captions of rich scenes, and that it paints them."""

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from cat_pruning.evaluation.rich_coverage import rich_coverage
from cat_pruning.models import miniatures, rich_scenes
from cat_pruning.models.prompts import load_prompts


@pytest.fixture(scope="module")
def pipeline():
    folder = miniatures()["sd3-mini-256"]
    options = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_an_image_is_of_256_pixels_and_1024_tokens(pipeline):
    config = pipeline.transformer.config
    assert config.sample_size * pipeline.vae_scale_factor == 256
    assert (config.sample_size // config.patch_size) ** 2 == 1024
    assert pipeline.transformer.pos_embed.pos_embed.shape == (1, 1024, 192)


def test_four_tokens_are_around_the_place_of_one_of_sd3_mini(pipeline):
    small = SD3Transformer2DModel.from_pretrained(miniatures()["sd3-mini"] / "transformer").pos_embed
    around = pipeline.transformer.pos_embed.pos_embed[0].view(16, 2, 16, 2, 192).mean(dim=(1, 3)).flatten(0, 1)
    torch.testing.assert_close(around, small.cropped_pos_embed(32, 32)[0].float(), rtol=0, atol=0.01)


def test_every_word_is_one_token_and_every_caption_fits(pipeline):
    assert pipeline.tokenizer.model_max_length == pipeline.tokenizer_2.model_max_length == 48
    captions = [prompt.text for prompt in load_prompts("rich:64")]
    lengths = [len(ids) for ids in pipeline.tokenizer(captions).input_ids]
    assert lengths == [len(caption.replace(",", " ,").split()) + 2 for caption in captions]
    assert max(lengths) <= 48
    assert all(len(pipeline.tokenizer.tokenize(word)) == 1 for word in rich_scenes.vocabulary())


@pytest.mark.long
def test_a_caption_is_seen_in_the_picture(pipeline):
    prompt, other = load_prompts("rich:2")
    image = pipeline(
        prompt.text,
        num_inference_steps=8,
        guidance_scale=3.0,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    pixels = np.round(image * 255).astype(np.uint8)
    assert rich_coverage(pixels, prompt.scene) > 0.4
    assert rich_coverage(pixels, other.scene) < 0.25
