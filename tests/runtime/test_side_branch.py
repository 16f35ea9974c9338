"""Calls on the side of an image: no steps of it, the tokens of its steps, caches of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cat_pruning.engines.session_pool import SessionPool
from cat_pruning.engines.step_engine import StepEngine, TokenChoice
from cat_pruning.runtime.sampling import Sampling
from cat_pruning.runtime.step_call import StepCall
from cat_pruning.settings import PruneSettings, Reuse

SETTINGS = PruneSettings(keep_ratio=0.4, full_steps=4, num_clusters=6)
TIMESTEPS = torch.linspace(1000, 100, 10)
KEPT = [64] * 4 + [25] * 6


class Spied:
    """A `Sampling` over a real engine, and the steps that each of its sessions computed."""

    def __init__(self, engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = engine
        self.kept: list[list[Tensor]] = []  # by session: the image's, then one for every side branch
        self.noises: list[list[Tensor]] = []
        make = engine.session

        def session() -> Any:
            made = make()
            kept: list[Tensor] = []
            noises: list[Tensor] = []
            self.kept.append(kept)
            self.noises.append(noises)
            step = made.step

            def spied(latents: Tensor, timestep: float, tokens: Tensor | TokenChoice, *more: Any) -> Tensor:
                try:
                    noises.append(step(latents, timestep, tokens, *more))
                finally:
                    num_kept = tokens.shape[1] if isinstance(tokens, Tensor) else tokens.num_kept
                    kept.append(made._keep_indices[num_kept].clone())
                return noises[-1]

            monkeypatch.setattr(made, "step", spied)
            return made

        monkeypatch.setattr(engine, "session", session)
        self.sampling = Sampling(SessionPool(engine), SETTINGS)
        generator = torch.Generator().manual_seed(0)
        config = engine.family.config
        self.arguments = {
            "encoder_hidden_states": torch.randn(2, 48, config["joint_attention_dim"], generator=generator),
            "pooled_projections": torch.randn(2, config["pooled_projection_dim"], generator=generator),
        }
        self.beside = {name: tensor[1:].clone() for name, tensor in self.arguments.items()}  # the positive row

    def latents(self, step: int) -> Tensor:
        one = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(step))
        return one.repeat(2, 1, 1, 1)

    def step(self, step: int, timesteps: Tensor = TIMESTEPS) -> None:
        self.sampling.call(StepCall(self.latents(step), timesteps[step].expand(2), self.arguments))

    def step_beside(self, step: int, skip_layers: tuple[int, ...] = (1,), timesteps: Tensor = TIMESTEPS) -> Tensor:
        latents, timestep = self.latents(step)[:1], timesteps[step].expand(1)
        return self.sampling.call_beside("side", StepCall(latents, timestep, self.beside, (), skip_layers))

    def num_kept(self, session: int) -> list[int]:
        return [indices.shape[1] for indices in self.kept[session]]


@pytest.fixture
def spied(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> Spied:
    return Spied(engine, monkeypatch)


def test_it_computes_the_tokens_of_the_images_last_rows(spied: Spied) -> None:
    for step in range(10):
        spied.step(step)
        spied.step_beside(step)
    image, branch = spied.kept
    assert spied.num_kept(0) == spied.num_kept(1) == KEPT
    for mine, theirs in zip(branch, image, strict=True):
        assert torch.equal(mine, theirs[1:])
    assert spied.sampling.record is not None
    assert spied.sampling.record.step == 9


def test_the_image_is_what_it_is_without_it(spied: Spied, engine: StepEngine) -> None:
    alone = Sampling(SessionPool(engine), SETTINGS)
    for step in range(10):
        expected = alone.call(StepCall(spied.latents(step), TIMESTEPS[step].expand(2), spied.arguments))
        spied.step(step)
        spied.step_beside(step)
        assert torch.equal(spied.noises[0][-1], expected)


def test_a_branch_that_skips_nothing_is_the_image_itself(spied: Spied) -> None:
    """Full steps to the rounding of another batch size, pruned ones too: the caches have the same rows."""
    for step in range(10):
        spied.step(step)
        noise = spied.step_beside(step, skip_layers=())
        torch.testing.assert_close(noise, spied.noises[0][-1][1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("keep_ratio", [0.4, 0.0])
def test_it_is_extrapolated_as_the_image_is(spied: Spied, keep_ratio: float) -> None:
    spied.sampling.settings = SETTINGS.replace(keep_ratio=keep_ratio, reuse=Reuse.EXTRAPOLATE, refresh_every=3)
    for step in range(10):
        noise = spied.sampling.call(StepCall(spied.latents(step), TIMESTEPS[step].expand(2), spied.arguments))
        beside = spied.step_beside(step, skip_layers=())
        torch.testing.assert_close(beside, noise[1:], rtol=0, atol=3e-4)
    repeated = spied.noises[1][-1]
    assert not torch.allclose(beside, repeated, atol=1e-2)


def test_a_skipped_block_counts(spied: Spied) -> None:
    spied.step(0)
    all_blocks = spied.step_beside(0, skip_layers=())
    assert not torch.allclose(all_blocks, spied.step_beside(0, skip_layers=(1,)), atol=1e-2)


def test_it_computes_every_token_after_a_gap(spied: Spied) -> None:
    for step in range(10):
        spied.step(step)
        if step not in (0, 1, 2, 3, 4, 7):
            spied.step_beside(step)
    assert spied.num_kept(0) == KEPT
    assert spied.num_kept(1) == [64, 25, 64, 25]  # on the steps 5, 6, 8, 9


def test_other_blocks_and_other_texts_begin_it_anew(spied: Spied) -> None:
    for step in range(6):
        spied.step(step)
        spied.step_beside(step)
    spied.step(6)
    spied.step_beside(6, skip_layers=(0,))
    spied.step(7)
    spied.beside = {name: tensor + 1 for name, tensor in spied.beside.items()}
    spied.step_beside(7, skip_layers=(0,))
    spied.step(8)
    spied.step_beside(8, skip_layers=(0,))
    assert spied.num_kept(1) == [64] * 4 + [25] * 2 + [64, 64, 25]


def test_a_new_image_begins_it_anew(spied: Spied) -> None:
    """The branch's own inputs are the same memory, so nothing but the image tells it."""
    for _ in range(2):
        for step in range(6):
            spied.step(step)
            if step >= 4:
                spied.step_beside(step)
    assert spied.num_kept(1) == [64, 25, 64, 25]
    assert torch.equal(spied.noises[1][0], spied.noises[1][2])
    torch.testing.assert_close(spied.noises[1][1], spied.noises[1][3], rtol=0, atol=1e-5)


def test_a_call_at_another_noise_level_computes_every_token(spied: Spied) -> None:
    for step in range(6):
        spied.step(step)
        spied.step_beside(step)
    spied.step_beside(7)
    spied.step(6)
    spied.step_beside(6)
    assert spied.num_kept(0) == KEPT[:7]
    assert spied.num_kept(1) == [*KEPT[:6], 64, 64]


def test_a_failure_begins_it_anew(spied: Spied, engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(5):
        spied.step(step)
        spied.step_beside(step)
    spied.step(5)
    assert spied.sampling.image is not None
    session_class = type(spied.sampling.image.session)
    with monkeypatch.context() as patch:
        patch.setattr(session_class, "_run", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            spied.step_beside(5)
    spied.step_beside(5)
    spied.step(6)
    spied.step_beside(6)
    assert spied.num_kept(0) == KEPT[:7]  # which goes on
    assert spied.num_kept(1) == [64] * 4 + [25] + [25, 64, 25]  # the one that failed, then all tokens


def test_a_new_schedule_that_a_call_beside_sees_first(spied: Spied) -> None:
    """And that goes on below the last timestep, with the same prompt: nothing else tells of a new image."""
    for step in range(5):
        spied.step(step)
        spied.step_beside(step)
    lower = TIMESTEPS - 500
    spied.step_beside(0, timesteps=lower)
    spied.step(0, lower)
    assert spied.num_kept(0) == KEPT[:5]
    assert spied.num_kept(3) == [64]  # after the new branch's session; the former image may still go on
    assert spied.sampling.record is not None
    assert spied.sampling.record.step == 0
