import grow_sd3_mini
import pytest
import torch
from diffusers import SD3Transformer2DModel
from grow_sd3_mini import stretched_positions, with_side, with_words
from mini_sd3 import Sd3Mini256
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from cat_pruning.models import miniatures, rich_scenes, scenes

SD3_MINI = miniatures()["sd3-mini"]


@pytest.fixture(scope="module")
def tokenizers():
    """sd3-mini's, and one that has the rich scenes' words as well."""
    words = sorted({*scenes.vocabulary(), *rich_scenes.vocabulary()})
    return CLIPTokenizer.from_pretrained(SD3_MINI / "tokenizer"), Sd3Mini256().new_tokenizer(words)


@pytest.fixture(scope="module")
def transformer():
    return SD3Transformer2DModel.from_pretrained(SD3_MINI / "transformer", torch_dtype=torch.float32)


def test_every_word_of_a_rich_caption_is_one_token_and_the_longest_fits(tokenizers):
    _, larger = tokenizers
    assert all(len(larger.tokenize(word)) == 1 for word in rich_scenes.vocabulary())
    things = [rich_scenes.RichThing("small", "plain", "red", "ring", place) for place in list(rich_scenes.PLACES)[:6]]
    longest = rich_scenes.RichScene(tuple(things), "dotted", "navy").caption
    assert len(larger(longest).input_ids) <= Sd3Mini256.text_length


def test_known_words_and_the_first_places_of_a_caption_keep_their_embeddings(tokenizers):
    known, larger = tokenizers
    encoder = CLIPTextModelWithProjection.from_pretrained(SD3_MINI / "text_encoder")
    grown = with_words(encoder, known, larger)
    before, after = (each.text_model.embeddings for each in (encoder, grown))
    for word in ("red</w>", "star</w>", "<|endoftext|>"):
        rows = (before.token_embedding.weight[known.get_vocab()[word]], after.token_embedding.weight)
        assert torch.equal(rows[0], rows[1][larger.get_vocab()[word]])
    assert after.position_embedding.weight.shape == (48, 96)
    assert torch.equal(after.position_embedding.weight[:24], before.position_embedding.weight)
    assert grown.config.eos_token_id == larger.eos_token_id
    layer = "text_model.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(grown.state_dict()[layer], encoder.state_dict()[layer])


def test_at_its_own_side_the_transformer_is_the_same(transformer):
    same = with_side(transformer, 128)
    inputs = {
        "hidden_states": torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.zeros(1, 8, 192),
        "pooled_projections": torch.zeros(1, 192),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }
    with torch.no_grad():
        torch.testing.assert_close(same(**inputs)[0], transformer(**inputs)[0], rtol=1e-3, atol=1e-3)  # table in fp16


def test_at_twice_the_side_four_tokens_are_around_the_place_of_one():
    small, large = (stretched_positions(tokens, 192)[0] for tokens in (16, 32))
    around = large.view(16, 2, 16, 2, 192).mean(dim=(1, 3)).flatten(0, 1)
    # Not equal: a sine's mean a quarter of a step to both sides is cos(1/8) of it.
    torch.testing.assert_close(around, small, rtol=0, atol=0.01)
    assert not torch.allclose(around, small.roll(1, 0), atol=0.1)


def test_a_side_that_tokens_do_not_fill_is_refused(tmp_path):
    with pytest.raises(ValueError, match="side=100: expected a multiple of 8"):
        grow_sd3_mini.grow(SD3_MINI, tmp_path / "out", 100)
