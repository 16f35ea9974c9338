"""Which image a call is of: images in turn, amid another, by handles and by threads; and the memory that they share."""

from __future__ import annotations

import functools
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cat_pruning.errors import EngineError, SettingsError
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.schedule import StepKind
from cat_pruning.settings import PruneSettings

Make = Callable[..., Any]
SETTINGS = PruneSettings(keep_ratio=0.4, full_steps=3, num_clusters=3)
FORECAST = {"keep_ratio": 0.0, "reuse": "extrapolate", "full_steps": 2, "refresh_every": 3}
STEPS = 7
TIMESTEPS = torch.linspace(1000, 100, STEPS)
KINDS = "FFFPPPP"


@dataclass
class Loop:
    """A sampling loop of one image, a step at a time, as a pipeline has it: timesteps that are views of a schedule.

    Attributes:
        call: of the transformer, or of a handle.
        latents: as far as they are.
        kinds: of the steps so far, each a letter.
    """

    call: Any
    arguments: dict[str, Tensor]
    latents: Tensor
    timesteps: Tensor
    kinds: str = ""
    done: int = 0

    def step(self, **more: Any) -> None:
        timestep = self.timesteps[self.done].expand(self.latents.shape[0])
        with torch.no_grad():
            noise = self.call(self.latents, timestep=timestep, **{**self.arguments, **more}).sample
        self.latents = self.latents - noise / len(self.timesteps)
        self.kinds += letter(self.call)
        self.done += 1

    def run(self, steps: int = STEPS) -> Tensor:
        for _ in range(steps):
            self.step()
        return self.latents


def letter(call: Any) -> str:
    """Of what the last call computed; an untouched module computes everything."""
    step = getattr(call, "last_step", None)
    return {StepKind.FULL: "F", StepKind.PRUNED: "P", StepKind.FORECAST: "-"}[step.kind] if step else "F"


def arguments_of(kind: str, seed: int, batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind == "flux-dev":
        ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(6.0), torch.arange(6.0), indexing="ij"), -1)
        return {
            "encoder_hidden_states": torch.randn(batch, 5, 24, generator=generator),
            "pooled_projections": torch.randn(batch, 20, generator=generator),
            "txt_ids": torch.zeros(5, 3),
            "img_ids": ids.view(-1, 3),
            "guidance": torch.full((batch,), 3.5),
        }
    return {
        "encoder_hidden_states": torch.randn(batch, 5, 24, generator=generator),
        "pooled_projections": torch.randn(batch, 20, generator=generator),
    }


def latents_of(kind: str, seed: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 36, 16) if kind == "flux-dev" else (batch, 4, 12, 12)
    return torch.randn(shape, generator=generator)


def loop(call: Any, kind: str = "sd3", seed: int = 0, prompt: int | None = None, **changes: Any) -> Loop:
    timesteps = TIMESTEPS.clone() / (1000 if kind == "flux-dev" else 1)
    arguments = arguments_of(kind, seed if prompt is None else prompt)
    return Loop(
        **{"call": call, "arguments": arguments, "latents": latents_of(kind, seed), "timesteps": timesteps} | changes
    )


class Hidden(Loop):
    """A loop whose timesteps are tensors of their own, as FLUX's pipelines make them."""

    def step(self, **more: Any) -> None:
        self.timesteps = self.timesteps.clone()
        timestep = torch.full((self.latents.shape[0],), self.timesteps[self.done].item())
        with torch.no_grad():
            noise = self.call(self.latents, timestep=timestep, **{**self.arguments, **more}).sample
        self.latents = self.latents - noise / len(self.timesteps)
        self.kinds += letter(self.call)
        self.done += 1


def hidden(call: Any, **changes: Any) -> Hidden:
    return Hidden(**vars(loop(call, "flux-dev", **changes)))


@pytest.fixture(scope="module")
def modules(make_tiny: Make) -> Callable[[str], Any]:
    return functools.cache(make_tiny)


@pytest.fixture
def make(modules: Make) -> Callable[..., CatTransformer]:
    def new(kind: str = "sd3", **changes: Any) -> CatTransformer:
        made = CatTransformer.from_model(modules(kind), SETTINGS.replace(**changes))
        assert isinstance(made, CatTransformer)
        return made

    return new


@pytest.fixture
def alone(make: Make) -> Callable[..., Tensor]:
    """The latents of an image that nothing else disturbs, computed once."""

    @functools.cache
    def image(kind: str, seed: int, prompt: int | None = None, **changes: Any) -> Tensor:
        single = loop(make(kind, **changes), kind, seed, prompt)
        latents = single.run()
        assert single.kinds == KINDS or changes
        return latents

    return image


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, "cat_pruning"):
        yield lambda: [record.getMessage() for record in caplog.records]


# By handles.


def test_images_in_turn_by_handles(make: Make, alone: Make) -> None:
    """24 on one thread, half of them with the same conditioning; each as if alone, to the bit."""
    transformer = make()
    transformer.sessions.max_sessions = 24
    images = [transformer.image() for _ in range(24)]
    loops = [loop(image, seed=seed % 8, prompt=0 if seed % 2 else None) for seed, image in enumerate(images)]
    for _ in range(STEPS):
        for each in loops:
            each.step()
    for seed, each in enumerate(loops):
        assert each.kinds == KINDS
        assert torch.equal(each.latents, alone("sd3", seed % 8, 0 if seed % 2 else None))
    assert transformer.sessions.num_sessions == 24
    for image in images:
        image.close()
    transformer.release()
    assert (transformer.sessions.num_sessions, transformer.sessions.num_bytes) == (0, 0)


def test_handles_keep_their_sessions_to_the_bound(make: Make, alone: Make) -> None:
    transformer = make()
    transformer.sessions.max_sessions = 2
    with transformer.image() as one, transformer.image() as other:
        first, second = loop(one, seed=1), loop(other, seed=2)
        first.step()
        second.step()
        refused = pytest.raises(EngineError, match=r"2 sessions are in use .* max_sessions=2; .*sessions\.max_sessions")
        with transformer.image() as third, refused:
            loop(third).step()
        with pytest.raises(EngineError, match="max_sessions=2"):  # as a pipeline's call has it
            loop(transformer).step()
        assert torch.equal(first.run(STEPS - 1), alone("sd3", 1))
    assert torch.equal(loop(transformer, seed=1).run(), alone("sd3", 1))
    assert transformer.sessions.num_sessions == 2


def test_a_handle_has_settings_of_its_own(make: Make) -> None:
    transformer = make()
    with transformer.image(SETTINGS.replace(full_steps=5)) as image:
        own = loop(image)
        own.run()
        assert image.last_step.step == STEPS - 1
    assert own.kinds == "FFFFFPP"
    assert transformer.settings == SETTINGS


def test_a_prompt_that_changes_within_a_handles_image(make: Make, modules: Make) -> None:
    transformer = make(keep_ratio=1.0)
    with transformer.image() as image:
        changing, expected = loop(image), loop(modules("sd3"))
        for step in range(STEPS):
            for each in (changing, expected):
                each.step(**(arguments_of("sd3", 9) if step > 3 else {}))
    assert torch.equal(changing.latents, expected.latents)
    with make().image() as image:
        pruned = loop(image)
        for step in range(STEPS):
            pruned.step(**(arguments_of("sd3", 9) if step > 3 else {}))
    assert pruned.kinds == "FFFP" + "F" + "PP"


def test_calls_beside_a_handles_image(make: Make, modules: Make) -> None:
    """True guidance in FLUX."""
    untouched = loop(modules("flux-dev"), "flux-dev")
    for _ in range(STEPS):
        untouched.step()
    negative = arguments_of("flux-dev", 5)
    with make("flux-dev", keep_ratio=1.0).image() as image, torch.no_grad():
        guided = loop(image, "flux-dev")
        for step in range(STEPS):
            before, timestep = guided.latents, guided.timesteps[step].expand(1)
            guided.step()
            beside = image(before, context="uncond", timestep=timestep, **negative).sample
            expected = modules("flux-dev")(before, timestep=timestep, **negative).sample
            torch.testing.assert_close(beside, expected, rtol=0, atol=0)
    assert torch.equal(guided.latents, untouched.latents)


def test_a_closed_image_takes_no_call(make: Make) -> None:
    transformer = make()
    with transformer.image() as image:
        closed = loop(image)
        closed.step()
    with pytest.raises(SettingsError, match="closed"):
        closed.step()
    assert image.last_step.step == 0
    with transformer.image() as image:
        failing = loop(image)
        failing.step()
        with pytest.raises(SettingsError, match="pooled_projections"):
            failing.step(pooled_projections=None)  # before anything is computed, so the image goes on
        failing.step()
        with pytest.raises(Exception, match="shape"):
            failing.step(pooled_projections=torch.zeros(1, 3))
        with pytest.raises(SettingsError, match="closed"):
            failing.step()
    assert transformer.sessions.num_sessions == 1


# As pipelines call.


def test_an_image_amid_another(make: Make, alone: Make) -> None:
    """A preview in a callback, of another pipeline over the same transformer."""
    for changes in ({}, FORECAST):
        transformer = make(**changes)
        outer = loop(transformer, seed=1)
        for step in range(STEPS):
            outer.step()
            if step in (1, 4):
                assert torch.equal(loop(transformer, seed=2).run(), alone("sd3", 2, **changes))
        assert torch.equal(outer.latents, alone("sd3", 1, **changes))
        assert transformer.sessions.num_sessions == 2


def test_an_image_amid_another_of_the_same_prompt(make: Make, alone: Make) -> None:
    transformer = make()
    outer, inner = loop(transformer, seed=1), loop(transformer, seed=2, prompt=1)
    inner.arguments = outer.arguments  # the very tensors; the schedule is another one
    outer.run(4)
    assert torch.equal(inner.run(), alone("sd3", 2, 1))
    assert torch.equal(outer.run(3), alone("sd3", 1))


def test_images_of_a_pipeline_that_hides_its_schedule_in_turn(make: Make, alone: Make) -> None:
    """The second one was taken for the negative prompt of the first."""
    transformer = make("flux-dev")
    images = [hidden(transformer, seed=seed) for seed in (1, 2)]
    for _ in range(STEPS):
        for image in images:
            image.step()
    for seed, image in zip((1, 2), images, strict=True):
        assert image.kinds == KINDS
        assert torch.equal(image.latents, alone("flux-dev", seed))


def test_images_in_turn_that_begin_with_the_same_latents(make: Make, modules: Make) -> None:
    """Until their second step they may as well be the two calls of guidance."""
    transformer, untouched = make("flux-dev", keep_ratio=1.0), modules("flux-dev")
    images = [hidden(transformer, seed=1, prompt=prompt) for prompt in (3, 4)]
    for _ in range(STEPS):
        for image in images:
            image.step()
    for prompt, image in zip((3, 4), images, strict=True):
        assert torch.equal(image.latents, loop(untouched, "flux-dev", 1, prompt).run())
    pruned = make("flux-dev")
    images = [hidden(pruned, seed=1, prompt=prompt) for prompt in (3, 4)]
    for _ in range(STEPS):
        for image in images:
            image.step()
    assert [image.kinds for image in images] == [KINDS, "F" + KINDS[:-1]]


def test_two_calls_with_two_prompts_are_guidance(make: Make) -> None:
    """Of SD3 in a loop of the user's: every step was full, without a word."""
    transformer = make()
    guided, negative = loop(transformer), arguments_of("sd3", 5)
    for step in range(STEPS):
        before, timestep = guided.latents, guided.timesteps[step].expand(1)
        guided.step()
        with torch.no_grad():
            transformer(before, timestep=timestep, **negative)
    assert guided.kinds == KINDS
    assert transformer.sessions.num_sessions == 2


def test_a_negative_prompt_that_is_shorter(make: Make, modules: Make) -> None:
    transformer, negative = make("flux-dev", keep_ratio=1.0), arguments_of("flux-dev", 5)
    negative |= {"encoder_hidden_states": negative["encoder_hidden_states"][:, :3], "txt_ids": negative["txt_ids"][:3]}
    guided = hidden(transformer)
    for step in range(STEPS):
        before, timestep = guided.latents, torch.full((1,), guided.timesteps[step].item())
        guided.step()
        with torch.no_grad():
            beside = transformer(before, timestep=timestep, **negative).sample
            assert torch.equal(beside, modules("flux-dev")(before, timestep=timestep, **negative).sample)
    assert guided.kinds == KINDS


def test_images_in_turn_that_nothing_tells_apart(make: Make, warnings: Make) -> None:
    transformer, untouched = make(), make(keep_ratio=1.0)
    images = [loop(transformer, seed=seed) for seed in (1, 2)]
    for image in images:
        image.arguments, image.timesteps = images[0].arguments, images[0].timesteps
    for _ in range(STEPS):
        for image in images:
            image.step()
    assert [image.kinds for image in images] == ["F" * STEPS] * 2
    for seed, image in zip((1, 2), images, strict=True):
        assert torch.equal(image.latents, loop(untouched, seed=seed, arguments=images[0].arguments).run())
    (message,) = warnings()
    assert "images that are stepped in turn cannot be told apart" in message
    assert "transformer.image()" in message
    assert loop(transformer, seed=3).run(4) is not None
    assert transformer.last_step.kind.value == "pruned"


def test_conditioning_that_is_made_anew_on_every_step(make: Make, alone: Make, warnings: Make) -> None:
    """As FLUX's ControlNet pipelines do with `guidance`; every step was full."""
    for kind, name in (("sd3", "pooled_projections"), ("flux-dev", "guidance")):
        image = (loop if kind == "sd3" else lambda call, kind, seed: hidden(call, seed=seed))(make(kind), kind, 1)
        for _ in range(STEPS):
            image.step(**{name: image.arguments[name].clone()})
        assert image.kinds == KINDS
        assert torch.equal(image.latents, alone(kind, 1))
    everything = loop(make(), seed=1)
    for _ in range(STEPS):
        everything.step(**{name: tensor.clone() for name, tensor in everything.arguments.items()})
    assert everything.kinds == KINDS
    assert not warnings()


def test_values_that_change_in_conditioning_that_is_made_anew(make: Make) -> None:
    image = loop(make())
    for step in range(STEPS):
        image.step(pooled_projections=image.arguments["pooled_projections"] + (step > 3))
    assert image.kinds == "FFFP" + "FFF"


@pytest.mark.parametrize("way", ["all conditioning in new memory", "rising timesteps", "another prompt on every call"])
def test_an_image_that_never_leaves_its_first_step_is_said_once(make: Make, warnings: Make, way: str) -> None:
    image = hidden(make("flux-dev"), seed=1)
    if way == "rising timesteps":
        image.timesteps = image.timesteps.flip(0)
    for step in range(STEPS):
        more = {
            name: tensor + (step if way[0] == "a" and "prompt" in way else 0)
            for name, tensor in image.arguments.items()
        }
        image.step(**({} if way == "rising timesteps" else more))
    assert image.kinds == "F" * STEPS
    (message,) = warnings()
    assert message.startswith("every call begins a new image, and so every step is computed in full: ")
    assert ("the timestep rose from" if way == "rising timesteps" else "all other conditioning") in message


def test_images_of_one_step_are_nothing_to_speak_of(make: Make, warnings: Make) -> None:
    transformer = make()
    for seed in range(6):
        loop(transformer, seed=seed).step()
    assert not warnings()


@pytest.mark.parametrize(("first", "later"), [(2, 1), (1, 2)])
@pytest.mark.parametrize(
    "changes", [{}, {"keep_ratio": 0.0, "reuse": "extrapolate", "full_steps": 2, "refresh_every": 3}]
)
def test_guidance_that_is_switched_amid_an_image(
    make: Make, modules: Make, first: int, later: int, changes: dict[str, Any]
) -> None:
    """As diffusers' SD3CFGCutoffCallback does: the prompt's rows go on alone. The image began anew."""

    def image(call: Any) -> tuple[Loop, str]:
        both = arguments_of("sd3", 0, batch=2)
        run, shown = loop(call), ""
        for step in range(STEPS):
            rows = first if step < 5 else later
            timestep, latents = run.timesteps[step].expand(rows), run.latents.expand(rows, -1, -1, -1)
            with torch.no_grad():
                noise = call(latents, timestep=timestep, **{name: both[name][-rows:] for name in both}).sample
            run.latents = run.latents - noise[-1:] / STEPS
            shown += letter(call)
        return run, shown

    whole, _ = image(make(**changes | {"keep_ratio": 1.0, "refresh_every": 0, "reuse": "repeat"}))
    untouched, _ = image(modules("sd3"))
    assert torch.equal(whole.latents, untouched.latents)
    run, kinds = image(make(**changes))
    if not changes:
        assert kinds == "FFFPP" + "F" + "P"
    else:  # a forecast is made of the rows that are left
        assert kinds == "FF-F-" + ("-" if later == 1 else "F") + "F"
    assert (run.latents - untouched.latents).norm() < 0.5 * untouched.latents.norm()


# The memory.


def test_threads_that_idle_hold_no_memory(make: Make, alone: Make) -> None:
    """A server's pool of workers had a session each."""
    transformer = make()
    barrier = threading.Barrier(6, timeout=60)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: barrier.wait(), range(6)))  # there are six
        for seed in range(6):
            run = loop(transformer, seed=seed)
            assert torch.equal(pool.submit(run.run).result(), alone("sd3", seed))
            assert transformer.sessions.num_sessions == 1


def test_many_threads_at_once(make: Make, alone: Make) -> None:
    transformer = make()
    transformer.sessions.max_sessions = 8
    with ThreadPoolExecutor(8) as pool:
        loops = [loop(transformer, seed=seed) for seed in range(16)]
        for seed, latents in enumerate(pool.map(Loop.run, loops)):
            assert torch.equal(latents, alone("sd3", seed))
    assert transformer.sessions.num_sessions <= 8


def test_a_session_that_is_taken_away(make: Make, warnings: Make) -> None:
    """With one for two images, every step is full, and right."""
    transformer, untouched = make(), make(keep_ratio=1.0)
    transformer.sessions.max_sessions = 1
    images = [loop(transformer, seed=seed) for seed in (1, 2)]
    for _ in range(STEPS):
        for image in images:
            image.step()
            assert transformer.sessions.num_sessions == 1
    (message,) = warnings()
    assert message.startswith("more images are in progress than max_sessions=1: ")
    for seed, image in zip((1, 2), images, strict=True):
        assert image.kinds == "F" * STEPS
        assert torch.equal(image.latents, loop(untouched, seed=seed).run())


def test_an_image_goes_on_after_its_session_was_taken_away(make: Make) -> None:
    transformer = make()
    transformer.sessions.max_sessions = 1
    outer = loop(transformer, seed=1)
    outer.run(5)
    loop(transformer, seed=2).step()
    outer.run(2)
    assert outer.kinds == "FFFPP" + "F" + "P"


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_an_image_that_was_broken_off_is_over_with_its_tensors(make: Make, kind: str) -> None:
    transformer = make(kind)
    for seed in range(4):
        broken = loop(transformer, kind, seed) if kind == "sd3" else hidden(transformer, seed=seed)
        broken.run(4)
        del broken
        gc.collect()
    loop(transformer, kind, 5).run()
    assert transformer.sessions.num_sessions == 1


def test_a_bound_that_is_set_lower(make: Make) -> None:
    """It held only for sessions that nobody had; those of images that rest go, too."""
    transformer = make()
    images = [loop(transformer, seed=seed) for seed in range(4)]
    for image in images:
        image.step()
    assert transformer.sessions.num_sessions == 4
    transformer.sessions.max_sessions = 2
    with transformer.image() as image:
        loop(image).step()
        assert transformer.sessions.num_sessions == 2


def test_a_copy_shares_the_bound(make: Make) -> None:
    import copy

    transformer = make()
    transformer.sessions.max_sessions = 1
    other = copy.deepcopy(transformer)
    loop(transformer).step()
    loop(other).step()
    assert transformer.sessions.num_sessions == other.sessions.num_sessions == 1


def test_idle_memory_is_bounded_by_bytes(make: Make) -> None:
    transformer = make()
    with transformer.image() as one, transformer.image() as other:
        loop(one).step()
        loop(other).step()
        both = transformer.sessions.num_bytes
    assert transformer.sessions.num_bytes == both
    transformer.sessions.max_bytes = both * 3 // 4
    loop(transformer).run()
    assert 0 < transformer.sessions.num_bytes <= both * 3 // 4


@pytest.mark.parametrize("number", [0, -1, 2.5, "2", True, None])
def test_a_bound_that_is_none(make: Make, number: Any) -> None:
    with pytest.raises(SettingsError, match=r"max_sessions=.*expected a whole number"):
        make().sessions.max_sessions = number


@pytest.mark.parametrize("number", [-1, 2.5, "2", True, float("nan")])
def test_a_number_of_bytes_that_is_none(make: Make, number: Any) -> None:
    with pytest.raises(SettingsError, match=r"max_bytes=.*expected a whole number of bytes"):
        make().sessions.max_bytes = number
