"""diffusers' own pipelines around transformers that no family knows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from tiny_pipelines import PIPELINES, TinyPipeline
from torch import Tensor

from cat_pruning import CatTransformer, PruneSettings
from cat_pruning.runtime.whole import WholeTransformer
from cat_pruning.schedule import Schedule

pytestmark = [  # diffusers' own
    pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning"),  # Chroma
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi
]

FORECAST = PruneSettings.preset("forecast", full_steps=2)
KINDS = "FFFfFf"  # of six steps
FULL = [0, 1, 2, 4]
STEPS = 6


class Spied:
    """A stand-in in a pipeline of its own, and what its calls gave."""

    def __init__(self, tiny: TinyPipeline, settings: PruneSettings = FORECAST, **parts: Any) -> None:
        self.tiny = tiny
        stand_in = CatTransformer.from_model(tiny.original, settings)
        assert isinstance(stand_in, WholeTransformer)
        self.transformer = stand_in
        self.pipe = tiny.around(stand_in, **parts)
        self.kinds: list[str] = []
        self.timesteps: list[float] = []
        self.outputs: list[Any] = []
        self.breaks_after: int | None = None
        stand_in.register_forward_hook(self._remember)

    def _remember(self, module: Any, arguments: Any, output: Any) -> None:
        step = self.transformer.last_step
        assert step is not None
        self.kinds.append("F" if step.kind == "full" else "f")
        self.timesteps.append(step.timestep)
        (first,) = output
        self.outputs.append([tensor.clone() for tensor in (first if isinstance(first, list) else [first])])
        if len(self.kinds) == self.breaks_after:
            raise KeyboardInterrupt

    def run(self, **arguments: Any) -> Tensor:
        self.kinds, self.timesteps, self.outputs = [], [], []
        return self.tiny.run(self.pipe, steps=STEPS, **arguments)

    def break_off(self, after: int, **arguments: Any) -> None:
        self.breaks_after = after
        with pytest.raises(KeyboardInterrupt):
            self.run(**arguments)
        self.breaks_after = None


@functools.cache
def untouched(name: str, guided: bool, seed: int = 0) -> Tensor:
    tiny = PIPELINES[name]
    return tiny.run(tiny.around(tiny.original), guided=guided, seed=seed, steps=STEPS)


@functools.cache
def fresh(name: str, guided: bool, seed: int = 0) -> Tensor:
    return Spied(PIPELINES[name]).run(guided=guided, seed=seed)


each = pytest.mark.parametrize("name", list(PIPELINES))
with_and_without = pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])


@each
@with_and_without
def test_every_step_full_is_the_untouched_pipeline(name: str, guided: bool) -> None:
    spied = Spied(PIPELINES[name], PruneSettings(keep_ratio=1))
    assert torch.equal(spied.run(guided=guided), untouched(name, guided))
    assert set(spied.kinds) == {"F"}


@each
@with_and_without
def test_forecasts_continue_the_line_of_each_stream(name: str, guided: bool) -> None:
    tiny = PIPELINES[name]
    spied = Spied(tiny)
    computed = 0

    def count(*_: Any) -> None:
        nonlocal computed
        computed += 1

    handle = tiny.original.register_forward_pre_hook(count)
    latents = spied.run(guided=guided)
    handle.remove()
    calls = tiny.calls_a_step if guided else 1
    assert "".join(spied.kinds[::calls]) == KINDS
    assert len(spied.kinds) == STEPS * calls
    assert computed == len(FULL) * calls
    assert not torch.allclose(latents, untouched(name, guided), rtol=1e-3, atol=1e-3)
    for step, (first, last) in {3: (1, 2), 5: (2, 4)}.items():
        begin, end, now = (spied.timesteps[number * calls] for number in (first, last, step))
        for call in range(calls):
            before, after, made = (spied.outputs[number * calls + call] for number in (first, last, step))
            for one, two, forecast in zip(before, after, made, strict=True):
                expected = two + (now - end) / (end - begin) * (two - one)
                torch.testing.assert_close(forecast, expected, rtol=1e-4, atol=1e-4)  # fp32, another order


@each
def test_an_image_is_what_it_is_whatever_was_before_it(name: str) -> None:
    """An image that was finished, one without guidance, and one that was broken off after some of its calls."""
    spied = Spied(PIPELINES[name])
    assert torch.equal(spied.run(seed=1), fresh(name, True, 1))
    assert torch.equal(spied.run(), fresh(name, True))
    assert torch.equal(spied.run(guided=False), fresh(name, False))
    for after in (1, PIPELINES[name].calls_a_step, 4):
        spied.break_off(after, seed=1)
        assert torch.equal(spied.run(), fresh(name, True)), after


@pytest.mark.parametrize("name", ["wan", "sana"])
def test_both_calls_of_a_second_order_step_are_of_one_step(name: str) -> None:
    """At the same timestep: with guidance by two calls within contexts, and by one call."""
    tiny = PIPELINES[name]
    whole = Spied(tiny, PruneSettings(keep_ratio=1), scheduler=FlowMatchHeunDiscreteScheduler())
    reference = tiny.run(tiny.around(tiny.original, scheduler=FlowMatchHeunDiscreteScheduler()), steps=STEPS)
    assert torch.equal(whole.run(), reference)
    spied = Spied(tiny, scheduler=FlowMatchHeunDiscreteScheduler())
    first = spied.run()
    calls = tiny.calls_a_step
    assert "".join(spied.kinds[::calls]) == "F" + "FF" + "FF" + "ff" + "FF" + "ff"
    assert torch.equal(spied.run(), first)


def test_a_run_that_begins_late_finds_its_rows() -> None:
    """As image to image does; the rows' forecasts are made of what this image has computed, or are full."""
    tiny = PIPELINES["sana"]
    spied = Spied(tiny, PruneSettings(keep_ratio=1))
    spied.run()
    weights = {2: {0: -1.0, 1: 2.0}, 5: {3: -1.0, 4: 2.0}}
    schedule = Schedule.of(STEPS, [0, 1, 3, 4], weights, timesteps=tuple(spied.timesteps))
    spied.transformer.settings = PruneSettings.tuned(schedule)
    sigmas = [timestep / 1000 for timestep in spied.timesteps]
    spied.run()
    assert "".join(spied.kinds) == "FFfFFf"
    spied.kinds = []
    tiny.run(spied.pipe, steps=4, sigmas=sigmas[2:])
    assert "".join(spied.kinds) == "FFFf"  # row 2 reads what was not computed
    assert spied.transformer.last_step is not None
    assert spied.transformer.last_step.step == 5


def test_a_timestep_for_every_token() -> None:
    """Wan 2.2's small model. Its modulations are then a token's own, which rounds otherwise."""
    spied = Spied(PIPELINES["wan"], expand_timesteps=True)
    torch.testing.assert_close(spied.run(), fresh("wan", True), rtol=1e-4, atol=1e-4)
    assert "".join(spied.kinds[::2]) == KINDS


def test_two_transformers_with_a_schedule_each() -> None:
    """Wan 2.2: one for the high noise levels, one for the low ones."""
    tiny = PIPELINES["wan"]
    second = tiny.module(seed=1)
    parts = {"boundary_ratio": 0.5}
    untouched = tiny.run(tiny.around(tiny.original, transformer_2=second, **parts), steps=8)
    both = [CatTransformer.from_model(module, PruneSettings(keep_ratio=1)) for module in (tiny.original, second)]
    kinds: list[list[str]] = [[], []]
    timesteps: list[list[float]] = [[], []]
    for number, transformer in enumerate(both):

        def remember(module: Any, *_: Any, number: int = number) -> None:
            kinds[number].append(module.last_step.kind.value)
            timesteps[number].append(module.last_step.timestep)

        transformer.register_forward_hook(remember)
    pipe = tiny.around(both[0], transformer_2=both[1], **parts)
    assert torch.equal(tiny.run(pipe, steps=8), untouched)
    assert len(kinds[0]) == len(kinds[1]) == 8  # four steps of two calls
    levels = tuple(timesteps[0][::2] + timesteps[1][::2])
    schedule = Schedule.of(
        8, [0, 1, 3, 4, 5], {2: {0: -1.0, 1: 2.0}, 6: {4: -1.0, 5: 2.0}, 7: {3: 1.0}}, timesteps=levels
    )
    for transformer in both:
        transformer.settings = PruneSettings.tuned(schedule)
    images = []
    for _ in range(2):
        for each_kinds in kinds:
            each_kinds.clear()
        images.append(tiny.run(pipe, steps=8))
        assert kinds[0][::2] == kinds[0][1::2] == ["full", "full", "forecast", "full"]
        # Row 7 reads a step of the first transformer.
        assert kinds[1][::2] == kinds[1][1::2] == ["full", "full", "forecast", "full"]
    assert torch.equal(*images)
