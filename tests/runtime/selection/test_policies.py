"""What each policy chooses, beside the paper's own, which `test_selection` and `test_sampling` hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.families import family_of
from cat_pruning.runtime.selection.policies import SELECTORS, highest, mixed, ras_dense_steps
from cat_pruning.runtime.selection.selector import Selector
from cat_pruning.settings import Policy, PruneSettings

GRID = (8, 8)
NUM_TOKENS = 64
SETTINGS = PruneSettings(keep_ratio=0.3, num_clusters=6)
KEPT = 19


class Policied:
    """A policy over noise of its own for every step, two prompts under guidance."""

    def __init__(self, policy: Policy, transformer: Any, **changes: Any) -> None:
        self.family = family_of(transformer)
        settings = SETTINGS.replace(policy=policy, **changes)
        make = SELECTORS[policy]
        self.selector: Selector = make(self.family, settings, GRID, self.noise(0))
        self.latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)
        self.noises: list[Tensor] = []

    def noise(self, seed: int) -> Tensor:
        return torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(seed))

    def image(self, steps: int = 6) -> list[Tensor]:
        """The tokens of each step, whose noise is the tokens' own."""
        self.selector.reset()
        self.selector.refer_to(self.noise(100))
        self.noises = [self.noise(seed) for seed in range(steps)]
        tokens = [self.selector.first(self.latents, self.noises[0]).clone()]
        tokens += [self.selector(self.latents, noise).clone() for noise in self.noises[1:]]
        return tokens

    def tokens(self, noise: Tensor) -> Tensor:
        return self.family.noise_tokens(noise)


@pytest.fixture(scope="module")
def tiny(make_tiny: Callable[..., Any]) -> Any:
    return make_tiny("sd3")


@pytest.fixture(params=Policy)
def policy(request: pytest.FixtureRequest) -> Policy:
    return Policy(request.param)


def test_every_policy_has_a_selector() -> None:
    assert set(SELECTORS) == set(Policy)


def test_as_many_tokens_distinct_and_ascending(policy: Policy, tiny: Any) -> None:
    for tokens in Policied(policy, tiny).image():
        assert tokens.dtype == torch.int32
        assert tokens.shape == (4, KEPT)
        assert (tokens.diff(dim=1) > 0).all()
        assert tokens.min() >= 0
        assert tokens.max() < NUM_TOKENS


@pytest.mark.parametrize("keep_ratio", [0.3, 1.0])
def test_reference_tokens_take_turns(policy: Policy, tiny_flux: Any, keep_ratio: float) -> None:
    """40 of them, after the image's 64: of all 104, n are computed, those of the image as without references."""
    family, settings = family_of(tiny_flux), SETTINGS.replace(policy=policy, keep_ratio=keep_ratio)
    noises = [torch.randn(2, NUM_TOKENS + 40, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    latents = torch.zeros(2, NUM_TOKENS + 40, 16)
    alone = SELECTORS[policy](family, settings, GRID, noises[0][:, :NUM_TOKENS])
    both = SELECTORS[policy](family, settings, GRID, noises[0])
    assert both.num_kept == int(keep_ratio * (NUM_TOKENS + 40))
    for _ in range(2):  # the second image begins anew
        computed: list[Tensor] = []
        for selector, count in ((alone, NUM_TOKENS), (both, NUM_TOKENS + 40)):
            selector.reset()
            selector.refer_to(noises[0][:, :count])
        for step, noise in enumerate(noises[1:]):
            choose, choose_both = (each.first if step == 0 else each for each in (alone, both))
            expected = choose(latents[:, :NUM_TOKENS], noise[:, :NUM_TOKENS])
            tokens = choose_both(latents, noise)
            assert tokens.dtype == torch.int32
            assert tokens.shape == (2, both.num_kept)
            assert torch.equal(tokens[:, : alone.num_kept], expected)
            assert (tokens.diff(dim=1) > 0).all()
            computed.append(tokens[0, alone.num_kept :])
            both.count(torch.arange(NUM_TOKENS + 40, dtype=torch.int32).expand(2, -1))  # a full step in between
            alone.count(torch.arange(NUM_TOKENS, dtype=torch.int32).expand(2, -1))
        assert set(torch.cat(computed[: -(-40 // len(computed[0]))]).tolist()) == set(range(64, 104))


def test_another_image_of_the_same_noise_gets_the_same_tokens(policy: Policy, tiny: Any) -> None:
    policied = Policied(policy, tiny)
    first, second = policied.image(), policied.image()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_guidance_rows_share_their_tokens(policy: Policy, tiny: Any) -> None:
    for tokens in Policied(policy, tiny).image():
        assert torch.equal(tokens[:2], tokens[2:])


def test_noise_takes_the_highest_norms(tiny: Any) -> None:
    policied = Policied(Policy.NOISE, tiny)
    tokens = policied.image()
    reference = policied.tokens(policied.noise(100))
    for chosen, noise in zip(tokens, policied.noises, strict=True):
        norms = (policied.tokens(noise) - reference).norm(dim=-1)
        for row in (2, 3):  # the positive rows guide
            expected = sorted(norms[row].topk(KEPT).indices.tolist())
            assert chosen[row].tolist() == expected


def test_cluster_is_the_papers_first_selection_on_every_step(tiny: Any) -> None:
    """With all of a selection fresh and all quotas the first one's, CAT's later steps are the same."""
    cluster = Policied(Policy.CLUSTER, tiny)
    cat = Policied(Policy.CAT, tiny, fresh_fraction=1.0, fresh_quotas=(SETTINGS.first_quota,))
    assert all(torch.equal(a, b) for a, b in zip(cluster.image(), cat.image(), strict=True))
    assert cluster.selector.cluster_ids is not None


def test_stale_takes_every_token_in_turn(tiny: Any) -> None:
    images = Policied(Policy.STALE, tiny).image(10)
    for steps in range(1, 11):
        counts = torch.cat([each[0] for each in images[:steps]]).bincount(minlength=NUM_TOKENS)
        assert counts.max() - counts.min() <= 1


def test_stale_spreads_over_the_image(tiny: Any) -> None:
    """Every quarter of the image gets some of each step."""
    for tokens in Policied(Policy.STALE, tiny).image():
        rows, columns = tokens[0] // GRID[1], tokens[0] % GRID[1]
        quarters = (rows // 4) * 2 + columns // 4
        assert quarters.bincount(minlength=4).min() >= 1


def test_random_changes_with_the_step_and_favours_no_token(tiny: Any) -> None:
    tokens = Policied(Policy.RANDOM, tiny).image(200)
    assert len({tuple(each[0].tolist()) for each in tokens}) == 200
    counts = torch.cat([each[0] for each in tokens]).bincount(minlength=NUM_TOKENS)
    assert counts.min() > 30  # 59 expected, deviation 6.4
    assert counts.max() < 90


def test_ras_is_deviation_times_exp_of_drops(tiny: Any) -> None:
    policied = Policied(Policy.RAS, tiny)
    tokens = policied.image()
    drops = torch.zeros(4, NUM_TOKENS)
    for chosen, noise in zip(tokens, policied.noises, strict=True):
        metric = policied.tokens(noise).std(dim=-1) * drops.exp()
        for row in (2, 3):
            assert chosen[row].tolist() == sorted(metric[row].topk(KEPT).indices.tolist())
        drops += 1
        drops.scatter_add_(1, chosen.long(), -torch.ones(chosen.shape))


def test_ras_does_not_overflow(tiny: Any) -> None:
    tokens = torch.cat([each[0] for each in Policied(Policy.RAS, tiny).image(300)])
    assert tokens.bincount(minlength=NUM_TOKENS).min() > 60  # 89 expected: nothing starves


@pytest.mark.parametrize(
    ("steps", "full_steps", "expected"),
    [(28, 8, (12, 20)), (50, 8, (21, 36)), (28, 14, (20,)), (4, 8, ()), (28, 4, (12, 20))],
)
def test_ras_dense_steps(steps: int, full_steps: int, expected: tuple[int, ...]) -> None:
    assert ras_dense_steps(steps, full_steps) == expected


def test_ties_go_to_the_lower_index() -> None:
    values = torch.tensor([[1.0, 3.0, 1.0, 1.0, 3.0]])
    assert highest(values, 3).tolist() == [[0, 1, 4]]


def test_mixed_numbers_are_distinct_and_spread() -> None:
    numbers = mixed(torch.arange(10_000))
    assert numbers.unique().numel() == 10_000
    assert numbers.min() >= 0
    assert (numbers < 2**31).all()
    assert abs(numbers.double().mean() / 2**30 - 1) < 0.03


@pytest.mark.long
@pytest.mark.parametrize("policy", [policy for policy in Policy if policy is not Policy.CAT])
def test_engines_compute_the_same_tokens(
    policy: Policy, engines: dict[str, StepEngine], drop_in: Any, sample: Any
) -> None:
    images = [sample(drop_in(engine, policy=policy), 11) for engine in engines.values()]
    assert images[0].kinds == "FFFFFFFFPPP"
    assert images[0].same_tokens_as(images[1])
    assert torch.allclose(images[0].final, images[1].final, atol=1e-3)
