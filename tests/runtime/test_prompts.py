"""What text encoders returned, kept for the same prompt; and their weights, let go while steps are computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from cat_pruning.errors import SettingsError
from cat_pruning.runtime.components import EngineTextEncoder
from cat_pruning.runtime.prompts import PromptCache, cache_prompts, offload_text

NUM_BYTES = 4 * 3 * 8  # of what the encoder below returns for three tokens


class Encoder(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> BaseModelOutput:
        self.calls += 1
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        return BaseModelOutput(last_hidden_state=(scale * ids * mask)[..., None].expand(-1, -1, 8).float())


@pytest.fixture
def pipe() -> Any:
    return SimpleNamespace(text_encoder=Encoder(), text_encoder_2=Encoder(), text_encoder_3=None)


def ids(*numbers: int) -> Tensor:
    return torch.tensor([numbers])


@torch.no_grad()
def test_the_same_prompt_is_encoded_once(pipe: Any) -> None:
    cache = cache_prompts(pipe, 10 * NUM_BYTES)
    first, again, other = (pipe.text_encoder(ids(*numbers)) for numbers in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    assert again is first
    assert not torch.equal(other.last_hidden_state, first.last_hidden_state)
    assert (pipe.text_encoder.calls, cache.hits, cache.misses, cache.num_bytes) == (2, 1, 2, 2 * NUM_BYTES)
    cache.clear()
    pipe.text_encoder(ids(1, 2, 3))
    assert (pipe.text_encoder.calls, cache.num_bytes) == (3, NUM_BYTES)


@torch.no_grad()
@pytest.mark.parametrize(
    "changed",
    [
        lambda pipe: pipe.text_encoder_2(ids(1, 2, 3)),
        lambda pipe: pipe.text_encoder(ids(1, 2, 3), attention_mask=ids(1, 1, 0)),
        lambda pipe: pipe.text_encoder(ids(1, 2, 3), ids(1, 1, 0)),
        lambda pipe: pipe.text_encoder(ids(1, 2, 3), scale=2.0),
        lambda pipe: pipe.text_encoder(ids(1, 2, 3).int()),
        lambda pipe: pipe.text_encoder(ids(1, 2, 3).reshape(3, 1)),
    ],
)
def test_what_differs_is_encoded_anew(pipe: Any, changed: Any) -> None:
    cache = cache_prompts(pipe, 10 * NUM_BYTES)
    pipe.text_encoder(ids(1, 2, 3))
    changed(pipe)
    assert (cache.hits, cache.misses) == (0, 2)


@torch.no_grad()
def test_the_least_lately_used_goes_first(pipe: Any) -> None:
    cache = cache_prompts(pipe, 2 * NUM_BYTES + 1)
    for number in (1, 2, 1, 3, 1, 2):  # 3 pushes 2 out
        pipe.text_encoder(ids(number, 0, 0))
        assert cache.num_bytes <= cache.max_bytes
    assert pipe.text_encoder.calls == 4
    pipe.text_encoder(torch.ones(3, 9))  # larger than the cache
    assert cache.num_bytes == 2 * NUM_BYTES


def test_nothing_is_kept_of_training(pipe: Any) -> None:
    cache = cache_prompts(pipe, 10 * NUM_BYTES)
    for _ in range(2):
        pipe.text_encoder(ids(1, 2, 3))
    assert (pipe.text_encoder.calls, cache.hits, cache.misses) == (2, 0, 0)


@torch.no_grad()
def test_what_is_compared(pipe: Any) -> None:
    cache = cache_prompts(pipe, 10 * NUM_BYTES)
    for numbers in ((1, 2, 3), (1, 2, 3), (1, 2, 4)):
        pipe.text_encoder(ids(*numbers).to(torch.bfloat16))  # of which numpy has none
    assert (cache.hits, cache.misses) == (1, 2)
    for _ in range(2):  # of other types nothing is known
        pipe.text_encoder(ids(1, 2, 3), scale=np.float32(2.0))
    assert (cache.hits, cache.misses, pipe.text_encoder.calls) == (1, 2, 4)


def test_what_fails_is_not_kept() -> None:
    cache = PromptCache(100)

    def fail() -> None:
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):  # noqa: PT011  # our own
            cache.get("key", fail)
    assert cache.misses == 2


def test_weights_are_let_go_when_steps_begin() -> None:
    engine = SimpleNamespace(
        dtype=torch.float32, device=torch.device("cpu"), released=0, spec=SimpleNamespace(inputs=())
    )
    engine.release = lambda: setattr(engine, "released", engine.released + 1)
    encoder: Any = EngineTextEncoder(engine, None, lambda results: results)  # type: ignore[arg-type]
    pipe = SimpleNamespace(text_encoder=encoder, transformer=nn.Identity())
    offload_text(pipe)
    assert engine.released == 0
    pipe.transformer(torch.zeros(1))
    assert engine.released == 1
    with pytest.raises(SettingsError, match="offload: text_encoder_2 of this bundle run in torch"):
        offload_text(SimpleNamespace(text_encoder=encoder, text_encoder_2=Encoder(), transformer=nn.Identity()))
