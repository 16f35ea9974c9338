import numpy as np
import pytest
import teach_captions
import torch
from mini_models import ModelSize
from mini_sd3 import Sd3Mini256

from cat_pruning.models import rich_scenes

SIZE = ModelSize(side=32, width=24, num_layers=1, num_heads=2, text_width=32, text_layers=(2, 2))


@pytest.fixture
def untaught():
    miniature = Sd3Mini256()
    torch.manual_seed(0)
    tokenizer = miniature.new_tokenizer(rich_scenes.vocabulary())
    return miniature.new_denoiser(SIZE, tokenizer), tokenizer


def test_the_encoders_learn_and_the_transformer_stays(untaught, monkeypatch):
    denoiser, tokenizer = untaught
    monkeypatch.setattr(teach_captions, "BATCH", 8)
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    first = teach_captions.teach(denoiser, tokenizer, steps=1, peak_lr=0.0)
    later = teach_captions.teach(denoiser, tokenizer, steps=25, peak_lr=1e-2)
    assert later < first - 0.1
    same = {name for name, value in denoiser.state_dict().items() if torch.equal(value, before[name])}
    assert {name for name in before if name.startswith("transformer.")} <= same
    assert not {name for name in before if name.endswith("fc1.weight")} & same


def test_no_held_out_caption_is_taught():
    assert not any(rich_scenes.is_held_out(scene) for scene in teach_captions._sampled(np.random.default_rng(0)))
