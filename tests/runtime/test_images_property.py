"""Whatever calls were made before, the next whole image is that of a fresh transformer."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cat_pruning.errors import ShapeError
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings

STEPS = 5
SETTINGS = (
    PruneSettings(keep_ratio=0.4, full_steps=2, num_clusters=3),
    PruneSettings(keep_ratio=0.0, full_steps=2, refresh_every=2, reuse="extrapolate"),
    PruneSettings(keep_ratio=0.4, full_steps=2, num_clusters=3, policy="random"),
)
PROMPTS = [
    {
        "encoder_hidden_states": torch.randn(1, length, 24, generator=torch.Generator().manual_seed(seed)),
        "pooled_projections": torch.randn(1, 20, generator=torch.Generator().manual_seed(seed)),
    }
    for seed, length in enumerate((5, 5, 7))
]


class User:
    """Calls a transformer as pipelines and loops do, and never ends what it does not want to."""

    def __init__(self, transformer: CatTransformer) -> None:
        self.transformer = transformer
        self.call: Any = transformer
        self.begin(0, 0, 8, 1, True)

    def begin(self, seed: int, prompt: int, side: int, batch: int, is_view: bool) -> None:
        """A new image in the place of the one in progress, which is broken off."""
        shape = (batch, 4, side, side)
        self.latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.arguments = {name: tensor.repeat_interleave(batch, 0) for name, tensor in PROMPTS[prompt].items()}
        self.timesteps, self.done, self.is_view = torch.linspace(1000, 100, STEPS), 0, is_view

    def step(self) -> None:
        if self.done == STEPS:
            self.begin(self.done, 1, 8, 1, True)
        timestep = self.timesteps[self.done]
        timestep = timestep.expand(len(self.latents)) if self.is_view else timestep.clone().expand(len(self.latents))
        noise = self.call(self.latents, timestep=timestep, **self.arguments).sample
        self.latents = self.latents - noise / STEPS
        self.done += 1

    def repeat(self) -> None:
        """As the second call of a scheduler of second order."""
        self.done = max(0, self.done - 1)
        self.step()

    def anew(self) -> None:
        self.arguments = {name: tensor.clone() for name, tensor in self.arguments.items()}

    def prompt(self, prompt: int) -> None:
        self.arguments = {
            name: tensor.repeat_interleave(len(self.latents), 0) for name, tensor in PROMPTS[prompt].items()
        }

    def guidance(self) -> None:
        rows = 1 if len(self.latents) == 2 else 2
        self.latents = self.latents[:1].repeat(rows, 1, 1, 1)
        self.arguments = {name: tensor[-1:].repeat_interleave(rows, 0) for name, tensor in self.arguments.items()}

    def amid(self) -> None:
        inner = User(self.transformer)
        inner.begin(7, 2, 8, 1, True)
        for _ in range(3):
            inner.step()

    def beside(self) -> None:
        with self.transformer.cache_context("uncond"):
            timestep = self.timesteps[min(self.done, STEPS - 1)].expand(len(self.latents))
            self.transformer(self.latents, timestep=timestep, **self.arguments)

    def thread(self) -> None:
        thread = threading.Thread(target=self.step)
        thread.start()
        thread.join()

    def handle(self) -> None:
        self.call = self.transformer if not isinstance(self.call, CatTransformer) else self.transformer.image()

    def settings(self, number: int) -> None:
        self.transformer.settings = SETTINGS[number]

    def bound(self, number: int) -> None:
        self.transformer.sessions.max_sessions = number

    def fail(self) -> None:
        unfit = self.arguments | {"pooled_projections": torch.empty(0, 20)}
        with pytest.raises(ShapeError):
            self.transformer(self.latents, timestep=torch.tensor(50.0), **unfit)

    def reset(self) -> None:
        self.transformer.reset()

    def release(self) -> None:
        self.transformer.release()


def action(name: str, *arguments: Any) -> Any:
    return st.tuples(st.just(name), *arguments)


ACTIONS = st.one_of(
    action("begin", st.integers(0, 2), st.integers(0, 2), st.sampled_from((8, 12)), st.integers(1, 2), st.booleans()),
    *[action("step")] * 6,
    *[action(name) for name in ("repeat", "anew", "guidance", "amid", "beside", "thread", "handle", "fail")],
    action("prompt", st.integers(0, 2)),
    action("settings", st.integers(0, 2)),
    action("bound", st.integers(2, 4)),
    *[action(name) for name in ("reset", "release")],
)


def image(transformer: CatTransformer, *begin: Any) -> tuple[Tensor, list[str]]:
    user, kinds = User(transformer), []
    user.begin(*begin)
    for _ in range(STEPS):
        user.step()
        assert transformer.last_step is not None
        kinds.append(transformer.last_step.kind.value)
    return user.latents, kinds


@pytest.fixture(scope="module")
def fresh(make_tiny: Callable[..., Any]) -> Callable[[], CatTransformer]:
    module = make_tiny("sd3")

    def make() -> CatTransformer:
        made = CatTransformer.from_model(module, SETTINGS[0])
        assert isinstance(made, CatTransformer)
        return made

    return make


@pytest.fixture(scope="module")
def expected(fresh: Callable[[], CatTransformer]) -> Callable[..., tuple[Tensor, list[str]]]:
    @functools.cache
    def whole(number: int, *begin: Any) -> tuple[Tensor, list[str]]:
        transformer = fresh()
        transformer.settings = SETTINGS[number]
        return image(transformer, *begin)

    return whole


@pytest.mark.long
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    actions=st.lists(ACTIONS, max_size=14),
    number=st.integers(0, 2),
    # Latents of its own: with those of an image that had one step it may be that one's other call of guidance.
    begin=st.tuples(st.integers(10, 11), st.integers(0, 2), st.sampled_from((8, 12)), st.integers(1, 2), st.booleans()),
)
@torch.no_grad()
def test_the_next_image_is_a_fresh_ones(
    fresh: Callable[[], CatTransformer],
    expected: Callable[..., tuple[Tensor, list[str]]],
    actions: list[Any],
    number: int,
    begin: tuple[Any, ...],
) -> None:
    transformer = fresh()
    user = User(transformer)
    for name, *arguments in actions:
        getattr(user, name)(*arguments)
        assert transformer.sessions.num_sessions <= 16
    if not isinstance(user.call, CatTransformer):
        user.call.close()
    transformer.settings = SETTINGS[number]
    latents, kinds = image(transformer, *begin)
    assert kinds == expected(number, *begin)[1]
    assert torch.equal(latents, expected(number, *begin)[0])
