from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from cat_pruning.errors import ShapeError
from cat_pruning.runtime.selection.selection import (
    _cluster_max,
    cluster_features,
    cluster_scores,
    count_selection,
    first_selection,
    next_selection,
)
from cat_pruning.settings import Pooling, PruneSettings

# Relative noises that make ties likely, or that nothing decent should produce but a broken model may.
_NOISES: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "normal": lambda generator, n: torch.randn(2, n, 4, generator=generator),
    "few values": lambda generator, n: torch.randint(-1, 2, (2, n, 4), generator=generator).float(),
    "zero": lambda _, n: torch.zeros(2, n, 4),
    "not a number": lambda _, n: torch.full((2, n, 4), math.nan),
    "infinite": lambda _, n: torch.full((2, n, 4), -math.inf),
}
_CLUSTERS: dict[str, Callable[[torch.Generator, int, int], Tensor]] = {
    "random": lambda generator, n, k: torch.randint(0, k, (2, n), generator=generator),
    "one": lambda _, n, k: torch.full((2, n), k - 1),
    "two, the others empty": lambda _, n, k: (torch.arange(n) % 2 * (k - 1)).repeat(2, 1),
}
_SIZES = [(1, 1, 1), (8, 1, 3), (8, 8, 3), (20, 7, 20), (64, 19, 20), (64, 63, 5), (64, 64, 20), (100, 30, 1)]


# The reference: one row, plain Python, exact numbers, written from ALGORITHM.md.


def exact(rows: Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in token] for token in rows.tolist()]


def squared_norm(vector: list[Fraction]) -> Fraction:
    return sum((value * value for value in vector), Fraction(0))


def walk(
    noise: list[list[Fraction]], clusters: list[int], quotas: list[int], budget: int, pooling: Pooling
) -> list[int]:
    best_first = sorted(range(len(noise)), key=lambda token: (-squared_norm(noise[token]), token))
    scores: dict[int, Fraction] = {}
    for cluster in set(clusters):
        channels = list(zip(*(noise[t] for t in range(len(noise)) if clusters[t] == cluster), strict=True))
        pooled = [max(c) if pooling is Pooling.MAX else sum(c, Fraction(0)) / len(c) for c in channels]
        scores[cluster] = squared_norm(pooled)
    taken: list[int] = []
    for rank, cluster in enumerate(sorted(scores, key=lambda c: (-scores[c], c))):
        members = [token for token in best_first if clusters[token] == cluster]
        quota = quotas[min(rank, len(quotas) - 1)]
        taken += members[: min(quota, budget - len(taken))]
    taken += [token for token in best_first if token not in taken][: budget - len(taken)]
    return taken


def reference_first(noise: Tensor, clusters: list[int], num_kept: int, settings: PruneSettings) -> list[int]:
    quotas = [max(1, int(settings.first_quota * num_kept))]
    return sorted(walk(exact(noise), clusters, quotas, num_kept, settings.pooling))


def reference_next(
    noise: Tensor, clusters: list[int], counts: list[float], num_kept: int, settings: PruneSettings
) -> list[int]:
    rows = exact(noise)
    quotas = [max(1, int(quota * num_kept)) for quota in settings.fresh_quotas]
    taken = walk(rows, clusters, quotas, round(settings.fresh_fraction * num_kept), settings.pooling)
    left = [token for token in range(len(rows)) if token not in taken]
    left.sort(key=lambda token: (counts[token], -squared_norm(rows[token]), token))
    return sorted(taken + left[: num_kept - len(taken)])


def random_settings(generator: torch.Generator, num_clusters: int, pooling: Pooling) -> PruneSettings:
    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    return PruneSettings(
        num_clusters=num_clusters,
        pooling=pooling,
        first_quota=draw(0.02, 0.6),
        fresh_fraction=draw(0.0, 1.0),
        fresh_quotas=tuple(draw(0.01, 0.4) for _ in range(int(draw(1, 5)))),
    )


def check_selection(keep_indices: Tensor, num_tokens: int, num_kept: int) -> None:
    assert keep_indices.shape == (2, num_kept)
    assert keep_indices.dtype == torch.int32
    assert keep_indices.min() >= 0
    assert keep_indices.max() < num_tokens
    assert (keep_indices.diff(dim=1) > 0).all()  # ascending and distinct


@pytest.mark.parametrize(("num_tokens", "num_kept", "num_clusters"), _SIZES)
@pytest.mark.parametrize("noise", _NOISES)
@pytest.mark.parametrize("clusters", _CLUSTERS)
@pytest.mark.parametrize("pooling", Pooling)
def test_exactly_n_distinct_tokens(
    num_tokens: int, num_kept: int, num_clusters: int, noise: str, clusters: str, pooling: Pooling
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    settings = PruneSettings(num_clusters=num_clusters, pooling=pooling)
    relative_noise = _NOISES[noise](generator, num_tokens)
    cluster_ids = _CLUSTERS[clusters](generator, num_tokens, num_clusters)
    keep_indices = first_selection(relative_noise, cluster_ids, num_kept, settings)
    check_selection(keep_indices, num_tokens, num_kept)
    count = count_selection(torch.zeros(2, num_tokens), keep_indices, 0.5)
    for _ in range(3):
        keep_indices = next_selection(relative_noise, cluster_ids, count, num_kept, settings)
        check_selection(keep_indices, num_tokens, num_kept)
        count = count_selection(count, keep_indices, 0.5)


@pytest.mark.parametrize("num_kept", range(1, 13))
@pytest.mark.parametrize("fresh_fraction", [0.0, 0.25, 1.0])
def test_every_number_of_kept_tokens(num_kept: int, fresh_fraction: float) -> None:
    settings = PruneSettings(num_clusters=3, fresh_fraction=fresh_fraction)
    generator = torch.Generator().manual_seed(num_kept)
    relative_noise = torch.randn(2, 12, 4, generator=generator)
    cluster_ids = torch.randint(0, 3, (2, 12), generator=generator)
    check_selection(first_selection(relative_noise, cluster_ids, num_kept, settings), 12, num_kept)
    check_selection(next_selection(relative_noise, cluster_ids, torch.ones(2, 12), num_kept, settings), 12, num_kept)


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("values", ["few", "many"])
@pytest.mark.parametrize("seed", range(40))
def test_equals_the_reference(pooling: Pooling, values: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_clusters = (int(x) for x in torch.randint(1, 40, (2,), generator=generator))
    num_kept = int(torch.randint(1, num_tokens + 1, (), generator=generator))
    settings = random_settings(generator, num_clusters, pooling)
    cluster_ids = torch.randint(0, num_clusters, (3, num_tokens), generator=generator)
    if values == "few":  # ties everywhere, between tokens and between clusters; squares and sums are exact in fp32
        relative_noise = torch.randint(-2, 3, (3, num_tokens, 2), generator=generator).float()
    else:
        relative_noise = torch.randn(3, num_tokens, 5, generator=generator)
    counts = torch.randint(0, 4, (3, num_tokens), generator=generator) / 2.0

    first = first_selection(relative_noise, cluster_ids, num_kept, settings)
    later = next_selection(relative_noise, cluster_ids, counts, num_kept, settings)
    for row in range(3):
        noise, clusters = relative_noise[row], cluster_ids[row].tolist()
        assert first[row].tolist() == reference_first(noise, clusters, num_kept, settings)
        assert later[row].tolist() == reference_next(noise, clusters, counts[row].tolist(), num_kept, settings)


def test_first_selection_by_hand() -> None:
    # Scores 9, 8, 7 in cluster 1 and 6, 5, 4, 3 in cluster 0; at most ⌊0.5 · 4⌋ = 2 of each.
    relative_noise = torch.tensor([[[3.0], [9.0], [6.0], [8.0], [5.0], [7.0], [4.0]]])
    cluster_ids = torch.tensor([[0, 1, 0, 1, 0, 1, 0]])
    settings = PruneSettings(num_clusters=2, first_quota=0.5)
    assert first_selection(relative_noise, cluster_ids, 4, settings).tolist() == [[1, 2, 3, 4]]
    # At most one of each leaves two open, which go to the highest scores left: 8 and 7.
    assert first_selection(relative_noise, cluster_ids, 4, settings.replace(first_quota=0.25)).tolist() == [
        [1, 2, 3, 5]
    ]


def test_next_selection_by_hand() -> None:
    relative_noise = torch.tensor([[[3.0], [9.0], [6.0], [8.0], [5.0], [7.0], [4.0]]])
    cluster_ids = torch.tensor([[0, 1, 0, 1, 0, 1, 0]])
    counts = torch.tensor([[0.5, 0.0, 1.0, 0.5, 1.0, 1.0, 0.5]])
    settings = PruneSettings(num_clusters=2, fresh_fraction=0.5, fresh_quotas=(0.25, 0.5))
    # Fresh: token 1 of cluster 1, token 2 of cluster 0. Stale: of the three counts of 0.5 the two with higher scores.
    assert next_selection(relative_noise, cluster_ids, counts, 4, settings).tolist() == [[1, 2, 3, 6]]


def test_the_quotas_are_respected() -> None:
    num_tokens, num_kept = 400, 100
    cluster_ids = (torch.arange(num_tokens) // 20).unsqueeze(0)  # 20 clusters of 20 tokens
    relative_noise = torch.randn(1, num_tokens, 4, generator=torch.Generator().manual_seed(0))
    settings = PruneSettings()
    sizes = cluster_ids[0, first_selection(relative_noise, cluster_ids, num_kept, settings)[0].long()].bincount()
    assert sorted(sizes[sizes > 0].tolist()) == [10] * 10  # 0.10 · 100 from each of the ten best

    all_fresh = settings.replace(fresh_fraction=1.0)
    keep = next_selection(relative_noise, cluster_ids, torch.zeros(1, num_tokens), num_kept, all_fresh)[0].long()
    order = cluster_scores(relative_noise, cluster_ids, 20, Pooling.MAX)[0].argsort(descending=True)
    sizes = cluster_ids[0, keep].bincount(minlength=20)[order]
    assert sizes.tolist() == [15, 10] + [5] * 15 + [0] * 3


def test_a_tie_goes_to_the_lower_index_and_the_lower_cluster() -> None:
    settings = PruneSettings(num_clusters=3, first_quota=0.5)
    relative_noise = torch.ones(1, 9, 2)
    cluster_ids = torch.tensor([[2, 2, 2, 1, 1, 1, 0, 0, 0]])
    assert first_selection(relative_noise, cluster_ids, 4, settings).tolist() == [[3, 4, 6, 7]]
    assert first_selection(relative_noise, cluster_ids, 5, settings).tolist() == [[0, 3, 4, 6, 7]]


def test_stale_tokens_are_those_selected_least() -> None:
    settings = PruneSettings(num_clusters=2, fresh_fraction=0.0)
    counts = torch.tensor([[1.5, 0.25, 0.0, 1.0, 0.25, 0.75]])
    relative_noise = torch.tensor([[[1.0], [1.0], [1.0], [9.0], [2.0], [1.0]]])
    cluster_ids = torch.zeros(1, 6, dtype=torch.int64)
    selections = [next_selection(relative_noise, cluster_ids, counts, n, settings)[0].tolist() for n in range(1, 6)]
    assert selections == [[2], [2, 4], [1, 2, 4], [1, 2, 4, 5], [1, 2, 3, 4, 5]]


def test_fresh_tokens_are_not_stale_tokens_too() -> None:
    # Every token is equally stale, so ‖RN‖ alone orders them; the fresh ones must be passed over.
    relative_noise = torch.arange(20.0).flip(0).view(1, 20, 1)
    keep = next_selection(relative_noise, torch.zeros(1, 20, dtype=torch.int64), torch.zeros(1, 20), 8, PruneSettings())
    assert keep.tolist() == [list(range(8))]


def test_staleness_computes_every_token_in_time() -> None:
    num_tokens, num_kept = 120, 24
    settings = PruneSettings(num_clusters=6)
    generator = torch.Generator().manual_seed(0)
    relative_noise = torch.randn(
        2, num_tokens, 4, generator=generator
    )  # never changes: the same tokens are always best
    cluster_ids = torch.randint(0, 6, (2, num_tokens), generator=generator)
    count = torch.zeros(2, num_tokens)
    for _ in range(math.ceil(num_tokens / (num_kept - 6))):  # 6 of the 24 are fresh
        keep = next_selection(relative_noise, cluster_ids, count, num_kept, settings)
        count = count_selection(count, keep, settings.staleness_decay)
    assert (count > 0).all()


def test_count_selection() -> None:
    count = torch.tensor([[0.0, 1.0, 1.5, 0.25]])
    new = count_selection(count, torch.tensor([[1, 3]], dtype=torch.int32), 0.5)
    assert new.tolist() == [[0.0, 1.5, 0.75, 1.125]]
    assert count.tolist() == [[0.0, 1.0, 1.5, 0.25]]
    assert count_selection(count, torch.tensor([[0, 2]]), 0.0).tolist() == [[1.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("pooling", Pooling)
def test_rows_are_independent_and_runs_equal(pooling: Pooling) -> None:
    num_tokens, num_kept, num_prompts = 144, 43, 4
    settings = PruneSettings(pooling=pooling)
    generator = torch.Generator().manual_seed(7)
    relative_noise = torch.randn(num_prompts, num_tokens, 16, generator=generator)
    relative_noise[1] = 0.0
    cluster_ids = torch.randint(0, 20, (num_prompts, num_tokens), generator=generator)
    counts = torch.rand(num_prompts, num_tokens, generator=generator)
    first = first_selection(relative_noise, cluster_ids, num_kept, settings)
    later = next_selection(relative_noise, cluster_ids, counts, num_kept, settings)
    assert torch.equal(first, first_selection(relative_noise, cluster_ids, num_kept, settings))
    assert torch.equal(later, next_selection(relative_noise, cluster_ids, counts, num_kept, settings))
    for row in range(num_prompts):
        one = slice(row, row + 1)
        assert torch.equal(first[one], first_selection(relative_noise[one], cluster_ids[one], num_kept, settings))
        assert torch.equal(
            later[one], next_selection(relative_noise[one], cluster_ids[one], counts[one], num_kept, settings)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted_before_any_arithmetic(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    relative_noise = (300.0 * torch.randn(2, 64, 8, generator=generator)).to(dtype)  # its square overflows fp16
    cluster_ids = torch.randint(0, 20, (2, 64), generator=generator)
    settings = PruneSettings()
    assert torch.equal(
        first_selection(relative_noise, cluster_ids, 19, settings),
        first_selection(relative_noise.float(), cluster_ids, 19, settings),
    )
    features = cluster_features(relative_noise, torch.zeros(64, 8), 0.05)
    assert features.dtype == torch.float32
    assert torch.equal(features, 0.05 * relative_noise.float())


def test_cluster_scores_pool_signed_values() -> None:
    relative_noise = torch.tensor([[[3.0, -9.0], [-5.0, -4.0], [1.0, 1.0]]])
    cluster_ids = torch.tensor([[2, 2, 0]])
    scores = cluster_scores(relative_noise, cluster_ids, 4, Pooling.MAX)
    assert scores.tolist() == [[pytest.approx(math.sqrt(2)), -math.inf, 5.0, -math.inf]]  # max is (3, -4)
    scores = cluster_scores(relative_noise, cluster_ids, 4, Pooling.MEAN)
    assert scores[0, 2].item() == pytest.approx(math.hypot(-1.0, -6.5))


def test_a_cluster_spread_over_many_places_has_the_same_maximum() -> None:
    """As on a GPU."""
    generator = torch.Generator().manual_seed(0)
    noise, clusters = torch.randn(2, 100, 3, generator=generator), torch.randint(7, (2, 100), generator=generator)
    clusters[clusters == 3] = 4  # an empty one
    for one, many in zip(*(_cluster_max(noise, clusters, 7, places) for places in (1, 32)), strict=True):
        assert torch.equal(one, many)


def test_empty_clusters_do_not_use_up_a_rank() -> None:
    # Cluster 5 alone has tokens; its rank is 0, so the first quota is its own.
    settings = PruneSettings(num_clusters=6, fresh_fraction=1.0, fresh_quotas=(1.0, 0.1))
    relative_noise = torch.arange(10.0).view(1, 10, 1) - 20.0
    cluster_ids = torch.full((1, 10), 5)
    assert next_selection(relative_noise, cluster_ids, torch.zeros(1, 10), 4, settings).tolist() == [[0, 1, 2, 3]]
    assert cluster_scores(relative_noise, cluster_ids, 6, Pooling.MAX)[0, :5].tolist() == [-math.inf] * 5


@pytest.mark.parametrize("num_kept", [0, 9, -1])
def test_a_number_of_tokens_that_the_image_has_not_is_refused(num_kept: int) -> None:
    with pytest.raises(ShapeError, match=f"num_kept={num_kept}: expected 1 to 8"):
        first_selection(torch.zeros(1, 8, 2), torch.zeros(1, 8, dtype=torch.int64), num_kept, PruneSettings())


def test_tensors_that_disagree_are_refused() -> None:
    noise, ids = torch.zeros(2, 8, 2), torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(ShapeError, match="cluster_ids"):
        first_selection(noise, ids[:1], 4, PruneSettings())
    with pytest.raises(ShapeError, match="selection_count"):
        next_selection(noise, ids, torch.zeros(2, 7), 4, PruneSettings())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("pooling", Pooling)
def test_neither_synchronises_nor_leaves_its_device(device: str, pooling: Pooling) -> None:
    # Fake tensors have no values: .item(), nonzero and boolean masks fail, and so does a constant left on the host.
    settings = PruneSettings(num_clusters=5, pooling=pooling)
    with FakeTensorMode():
        noise = torch.empty(2, 24, 8, device=device, dtype=torch.float16)
        ids = torch.empty(2, 24, device=device, dtype=torch.int64)
        assert cluster_features(noise, torch.empty(24, 8, device=device), 0.05).shape == (2, 24, 8)
        first = first_selection(noise, ids, 7, settings)
        count = count_selection(torch.empty(2, 24, device=device), first, 0.5)
        later = next_selection(noise, ids, count, 7, settings)
    for keep_indices in (first, later):
        assert keep_indices.shape == (2, 7)
        assert keep_indices.dtype == torch.int32
        assert keep_indices.device.type == device


def test_fake_tensors_do_catch_a_synchronisation() -> None:
    with FakeTensorMode():
        mask = torch.empty(8) > 0
        with pytest.raises(DataDependentOutputException):
            mask.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            torch.empty(8)[mask]
