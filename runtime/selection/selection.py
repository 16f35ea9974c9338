"""Which tokens a pruned step computes: algorithm 2 of CAT Pruning (Cheng, Chen, Jia 2025), on a batch of prompts.

The walk of the paper's algorithm goes from cluster to cluster, best first, and takes a quota of the best
tokens of each. Here it is a budget: how many tokens the walk takes from each cluster follows from the
clusters' sizes alone, so two sorts and a prefix sum do what two nested loops would. No function here
synchronises with the host or has a shape that depends on values, so a pruned step fits one CUDA graph.

Every tie has one outcome: higher ‖RN‖ first, then the lower index; between clusters, the lower index.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from cat_pruning.errors import ShapeError
from cat_pruning.runtime.selection.kmeans import cluster_means, cluster_sizes
from cat_pruning.settings import Pooling, PruneSettings

GPU_PLACES: Final = 32  # of a cluster while its maximum is found


def cluster_features(relative_noise: Tensor, position_encoding: Tensor, noise_scale: float) -> Tensor:
    """What KMeans clusters: pos_enc + noise_scale · RN.

    Args:
        relative_noise: (P, N, C), any floating dtype.
        position_encoding: (N, C) fp32, from `cat_pruning.runtime.selection.kmeans.position_encoding`.
        noise_scale: weight of the noise against the position; 0 clusters by position alone.

    Returns:
        (P, N, C) fp32. Does not synchronise.
    """
    return position_encoding + noise_scale * relative_noise.float()


def cluster_scores(relative_noise: Tensor, cluster_ids: Tensor, num_clusters: int, pooling: Pooling) -> Tensor:
    """The score of each cluster: ‖pool{ RN_j : j in the cluster }‖₂, pooled channel by channel.

    Args:
        relative_noise: (P, N, C), any floating dtype.
        cluster_ids: (P, N) int64 in [0, K).
        num_clusters: K.
        pooling: signed maximum or mean.

    Returns:
        (P, K) fp32, -inf for an empty cluster. Does not synchronise.
    """
    noise = relative_noise.float()
    if pooling is Pooling.MAX:
        # On a GPU each cluster is spread over many places, because writes to one place wait for each other.
        pooled, sizes = _cluster_max(noise, cluster_ids, num_clusters, GPU_PLACES if noise.is_cuda else 1)
    else:
        pooled, sizes = cluster_means(noise, cluster_ids, num_clusters)
    scores: Tensor = torch.linalg.vector_norm(pooled, dim=-1)
    return scores.masked_fill(sizes == 0, -math.inf)


def first_selection(
    relative_noise: Tensor, cluster_ids: Tensor, num_kept: int, settings: PruneSettings, quotas: Tensor | None = None
) -> Tensor:
    """The tokens of the first pruned step: algorithm 2 at i = t0 + 1.

    Walks the clusters in the order of their scores and takes from each its tokens of highest ‖RN‖, at most
    max(1, ⌊first_quota · n⌋) of them, until n are taken. What the quotas leave open is filled with the
    highest ‖RN‖ among all remaining tokens.

    Args:
        relative_noise: RN = n_i − n_t0, (P, N, C), any floating dtype; promoted to fp32 once.
        cluster_ids: (P, N) int64 in [0, num_clusters).
        num_kept: n, in [1, N].
        settings: `num_clusters`, `pooling` and `first_quota` are read.
        quotas: what `rank_quotas` makes of `first_quota`, where it is there already.

    Returns:
        keep_indices (P, n) int32, distinct and ascending in each row. Does not synchronise.

    Raises:
        ShapeError: n is not in [1, N], or the two tensors disagree.
    """
    _check_shapes(relative_noise, cluster_ids, num_kept)
    noise = relative_noise.float()
    by_score = _score_order(noise)
    if quotas is None:
        quotas = rank_quotas((settings.first_quota,), num_kept, settings.num_clusters, noise.device)
    taken = _walk(noise, cluster_ids, by_score, quotas, num_kept, settings.pooling)
    return _ascending_indices(taken, by_score, num_kept)


def next_selection(
    relative_noise: Tensor,
    cluster_ids: Tensor,
    selection_count: Tensor,
    num_kept: int,
    settings: PruneSettings,
    quotas: Tensor | None = None,
) -> Tensor:
    """The tokens of every later pruned step: algorithm 2 at i > t0 + 1, with the clusters of t0 + 1.

    round(fresh_fraction · n) tokens come from the walk of `first_selection`, with the quotas
    max(1, ⌊q · n⌋) by rank of the cluster, q from `fresh_quotas`. The rest of the n are stale tokens: those
    with the smallest selection count among the tokens not yet taken.

    Args:
        relative_noise: RN = n_i − n_t0, (P, N, C), any floating dtype; promoted to fp32 once. A token that
            was not computed on step i has the RN of its last computed output.
        cluster_ids: (P, N) int64 in [0, num_clusters).
        selection_count: f_i, (P, N) fp32, finite; see `count_selection`.
        num_kept: n, in [1, N].
        settings: `num_clusters`, `pooling`, `fresh_fraction` and `fresh_quotas` are read.
        quotas: what `rank_quotas` makes of `fresh_quotas`, where it is there already.

    Returns:
        keep_indices (P, n) int32, distinct and ascending in each row. Does not synchronise.

    Raises:
        ShapeError: n is not in [1, N], or the tensors disagree.
    """
    _check_shapes(relative_noise, cluster_ids, num_kept)
    if selection_count.shape != cluster_ids.shape:
        raise ShapeError(f"selection_count {tuple(selection_count.shape)}: expected {tuple(cluster_ids.shape)}")
    noise = relative_noise.float()
    num_fresh = round(settings.fresh_fraction * num_kept)
    by_score = _score_order(noise)
    if quotas is None:
        quotas = rank_quotas(settings.fresh_quotas, num_kept, settings.num_clusters, noise.device)
    taken = _walk(noise, cluster_ids, by_score, quotas, num_fresh, settings.pooling)
    # A stable sort of what lies in score order breaks ties by score; the infinite come last and are not reached.
    counts = selection_count.gather(1, by_score).masked_fill(taken, math.inf)
    stale = counts.argsort(dim=1, stable=True).narrow(1, 0, num_kept - num_fresh)
    return _ascending_indices(taken.scatter_(1, stale, True), by_score, num_kept)


def count_selection(selection_count: Tensor, keep_indices: Tensor, decay: float) -> Tensor:
    """The decayed count of selections, the paper's f_i(j): f ← decay · f + 1[j selected].

    Args:
        selection_count: (P, N) fp32; zeros before the first pruned step.
        keep_indices: (P, n) int32 or int64, distinct in each row.
        decay: in [0, 1).

    Returns:
        (P, N) fp32, new memory. Does not synchronise.
    """
    selected = torch.zeros_like(selection_count).scatter_(1, keep_indices.long(), 1.0)
    # Not one fused multiply-add: it would round otherwise, and a last bit decides ties between stale tokens.
    return selection_count * decay + selected


def _score_order(noise: Tensor) -> Tensor:
    """The tokens by ‖RN‖₂, highest first: (P, N) int64. Other tensors here "in score order" follow it."""
    norms: Tensor = torch.linalg.vector_norm(noise, dim=-1)
    return norms.argsort(dim=1, descending=True, stable=True)


def _walk(
    noise: Tensor, cluster_ids: Tensor, by_score: Tensor, quotas: Tensor, budget: int, pooling: Pooling
) -> Tensor:
    """The walk over the clusters and the fill after it: which tokens are taken, (P, N) bool in score order.

    With m_r the tokens of the cluster of rank r and q_r its quota, min(m_r, q_r) of them are eligible, and
    the walk takes as many of these as the budget still holds after the clusters ranked before.
    """
    num_prompts, num_tokens = cluster_ids.shape
    ranks = torch.arange(quotas.shape[0], device=noise.device).repeat(num_prompts, 1)  # (P, K)
    order = cluster_scores(noise, cluster_ids, quotas.shape[0], pooling).argsort(dim=1, descending=True, stable=True)
    # A sort takes as many passes as its keys have bytes.
    ranks = ranks.to(torch.uint8 if len(quotas) <= 256 else torch.int32)
    rank_of_cluster = torch.empty_like(ranks).scatter_(1, order, ranks)
    rank_of_token = rank_of_cluster.gather(1, cluster_ids.gather(1, by_score))  # in score order

    # Tokens by rank, by score within a rank: each cluster is one stretch of the walk.
    walk_ranks, walk = rank_of_token.sort(dim=1, stable=True)  # (P, N)
    begin = torch.searchsorted(walk_ranks, ranks)  # (P, K)
    sizes = torch.searchsorted(walk_ranks, ranks, right=True) - begin
    eligible = sizes.minimum(quotas)
    taken_before = eligible.cumsum(dim=1) - eligible
    take = (budget - taken_before).clamp(min=0).minimum(eligible)
    positions = torch.arange(num_tokens, device=noise.device)
    taken = positions < (begin + take).gather(1, walk_ranks.long())
    taken = torch.empty_like(taken).scatter_(1, walk, taken)  # in score order

    left_open = budget - take.sum(dim=1, keepdim=True)  # (P, 1)
    free = taken.logical_not()
    return taken | (free & (free.cumsum(dim=1) <= left_open))


def _cluster_max(noise: Tensor, cluster_ids: Tensor, num_clusters: int, places: int) -> tuple[Tensor, Tensor]:
    """Signed maximum over each cluster, (P, K, C), and the clusters' sizes, (P, K).

    Each cluster's tokens are spread over so many places first, and these pooled. A maximum has no order.
    """
    num_prompts, num_tokens, channels = noise.shape
    # One flat row of clusters for all prompts: torch has a fast path for it, three times as fast on a CPU.
    first = torch.arange(num_prompts, device=noise.device).unsqueeze(-1) * num_clusters
    index = cluster_ids + first
    if places > 1:
        index = index * places + torch.arange(num_tokens, device=noise.device) % places
    index = index.reshape(-1, 1).expand(-1, channels)  # (P * N, C), no memory of its own
    lowest = noise.new_full((num_prompts * num_clusters * places, channels), -math.inf)
    pooled = lowest.scatter_reduce_(0, index, noise.reshape(-1, channels), "amax")
    pooled = pooled.view(num_prompts, num_clusters, places, channels).amax(dim=2)
    return pooled, cluster_sizes(cluster_ids, num_clusters)


def rank_quotas(fractions: tuple[float, ...], num_kept: int, num_clusters: int, device: torch.device) -> Tensor:
    """Most tokens the cluster of each rank gives: max(1, ⌊q · n⌋), the last q for all further ranks. (K,) int64."""
    counts = [max(1, int(fraction * num_kept)) for fraction in fractions]
    # Filled on the device: a copy of a Python list would synchronise, and cannot be captured.
    quotas = torch.full((num_clusters,), counts[-1], dtype=torch.int64, device=device)
    for rank, count in enumerate(counts[:num_clusters]):
        quotas.select(0, rank).fill_(count)
    return quotas


def _ascending_indices(taken: Tensor, by_score: Tensor, num_kept: int) -> Tensor:
    """The indices of the tokens taken, ascending, from their mask in score order: (P, n) int32."""
    mask = torch.empty_like(taken).scatter_(1, by_score, taken)
    # The k-th of them is the first place where the running count reaches k; nonzero would synchronise.
    running = mask.cumsum(dim=1)
    k = torch.arange(1, num_kept + 1, device=taken.device).repeat(taken.shape[0], 1)
    return torch.searchsorted(running, k, out_int32=True)


def _check_shapes(relative_noise: Tensor, cluster_ids: Tensor, num_kept: int) -> None:
    num_tokens = relative_noise.shape[1]
    if cluster_ids.shape != relative_noise.shape[:2]:
        raise ShapeError(
            f"cluster_ids {tuple(cluster_ids.shape)}: expected {tuple(relative_noise.shape[:2])}, "
            "one cluster for each token of relative_noise"
        )
    if not 1 <= num_kept <= num_tokens:
        raise ShapeError(f"num_kept={num_kept}: expected 1 to {num_tokens}, the image's tokens")
