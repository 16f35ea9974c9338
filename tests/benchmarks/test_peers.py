"""That what `peers.py` counts and compares is what it says; cache-dit is no dependency and not tested."""

from __future__ import annotations

import contenders
import peers
import pytest
import torch
from contenders import BUDGETS, STEPS, Contender
from diffusers import hooks

from cat_pruning.models.prompts import load_prompts
from cat_pruning.schedule import StepKind
from cat_pruning.timeline import step_kinds

PROMPT = load_prompts("scenes:1")[0]


@pytest.fixture(scope="module")
def arena() -> peers.Arena:
    return peers.Arena("sd3-mini")


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_forecast_has_as_many_full_steps_as_its_budget(budget: int) -> None:
    kinds = step_kinds(STEPS, contenders.forecast_settings(budget))
    assert sum(kind is StepKind.FULL for kind in kinds) == budget


def test_taylor_seers_compute_as_many_steps_as_their_budgets() -> None:
    lite = [each for each in contenders.taylor_seers(None) if "lite" in each.name]
    assert [each.budget for each in lite] == list(BUDGETS)
    for contender in lite:
        before, _, _, _, _, _, interval = contender.setting.split()
        assert contenders._computed(int(before), int(interval)) == pytest.approx(contender.budget, abs=1)


@pytest.mark.long
def test_a_cache_that_never_skips_is_the_pipeline_and_one_that_always_does_costs_its_first_block(
    arena: peers.Arena,
) -> None:
    """With SD3's last block, which returns no text, in between; and the pipeline is as it was."""

    def first_block(threshold: float) -> Contender:
        config = hooks.FirstBlockCacheConfig(threshold=threshold)
        return contenders._hooked("", 0, "", hooks.apply_first_block_cache, config)

    transformer = arena.pipe.transformer
    steps = 8
    full = arena.run(peers._as_it_is, PROMPT, 0, steps)
    never, always = (arena.run(first_block(threshold).install, PROMPT, 0, steps) for threshold in (0.0, 99.0))
    assert (full.blocks, never.blocks) == (steps, steps)
    assert torch.equal(never.sample.latents, full.sample.latents)
    assert always.blocks == pytest.approx(1 + (steps - 1) / arena.num_blocks)
    assert arena.pipe.transformer is transformer


@pytest.mark.long
def test_flops_count_steps(arena: peers.Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "STEPS", 5)  # of the image that a step's share is taken of
    fewer = next(each for each in contenders.fewer_steps(arena.pipe) if each.budget == 7)
    assert arena.full_steps(fewer, PROMPT) == pytest.approx(7)
