"""Batched KMeans with one answer: a fixed start, a fixed number of iterations, stated ties, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from cat_pruning.errors import SettingsError, ShapeError

# The real root of x^3 = x + 1. Its powers 1/g and 1/g^2 are the steps of the R2 sequence
# (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences").
_PLASTIC_NUMBER = 1.324717957244746


def position_encoding(height: int, width: int, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """The position of every token, in as many channels as its noise has (Cheng, Chen, Jia 2025).

        pos_enc[i * w + j, k] = i / h for k < channels // 2, j / w for the other channels; i, j, k from 0

    Args:
        height: rows of the token grid.
        width: columns of the token grid.
        channels: channels C of a token's noise, p² times those of the latents; at least 2.
        device: where the result lives.

    Returns:
        (height * width, channels) fp32. Does not synchronise.

    Raises:
        ShapeError: an empty grid, or fewer than two channels.
    """
    _check_grid(height, width)
    if channels < 2:
        raise ShapeError(f"channels={channels}: the position needs at least 2, one for the row and one for the column")
    rows = torch.arange(height, dtype=torch.float32, device=device) / height
    columns = torch.arange(width, dtype=torch.float32, device=device) / width
    half = channels // 2
    row_part = rows.view(height, 1, 1).expand(height, width, half)
    column_part = columns.view(1, width, 1).expand(height, width, channels - half)
    return torch.cat((row_part, column_part), dim=-1).reshape(height * width, channels)


def initial_tokens(height: int, width: int, num_clusters: int, device: torch.device | str = "cpu") -> Tensor:
    """Tokens spread evenly over the image, the start of KMeans: the R2 low-discrepancy sequence (Roberts 2018).

        row_k = ⌊h · frac(½ + k/g)⌋, column_k = ⌊w · frac(½ + k/g²)⌋, with g the plastic number and k from 0

    It is the same for every image of one size. Two of the points may fall on one token when there are
    almost as many clusters as tokens; the later of them then becomes an empty cluster.

    Args:
        height: rows of the token grid.
        width: columns of the token grid.
        num_clusters: K.
        device: where the result lives.

    Returns:
        (K,) int64 token indices. Does not synchronise.

    Raises:
        ShapeError: an empty grid.
        SettingsError: num_clusters < 1.
    """
    _check_grid(height, width)
    if num_clusters < 1:
        raise SettingsError(f"num_clusters={num_clusters}: expected an integer >= 1")
    # fp64, because a floor turns a last bit into another token.
    k = torch.arange(num_clusters, dtype=torch.float64, device=device)
    rows = torch.frac(0.5 + k * (1 / _PLASTIC_NUMBER)).mul(height).long()
    columns = torch.frac(0.5 + k * (1 / _PLASTIC_NUMBER**2)).mul(width).long()
    return rows * width + columns


def kmeans(features: Tensor, initial: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm on each row of a batch, from given tokens, for a fixed number of iterations.

        repeat `iterations` times:  μ_k ← mean of { x_j : c_j = k },  c_j ← argmin_k ‖x_j − μ_k‖₂

    before which c_j is the nearest of the initial tokens. Ties go to the lowest cluster. A cluster that
    lost its last token keeps its centroid and may win tokens back. Rows do not see each other.

    Args:
        features: (P, N, C) fp32.
        initial: (K,) int64, the tokens whose features are the first centroids, the same for every row.
        iterations: at least 1.

    Returns:
        cluster_ids (P, N) int64, in [0, K). Does not synchronise; no atomics, so the same on every run.

    Raises:
        SettingsError: iterations < 1.
    """
    if iterations < 1:
        raise SettingsError(f"iterations={iterations}: expected an integer >= 1")
    num_clusters = initial.shape[0]
    wide = features.double()  # once, for the sums
    centroids = features.index_select(1, initial)  # (P, K, C)
    cluster_ids = _nearest(features, centroids)
    for _ in range(iterations):
        means, sizes = cluster_means(wide, cluster_ids, num_clusters)
        centroids = torch.where(sizes.unsqueeze(-1) > 0, means, centroids)
        cluster_ids = _nearest(features, centroids)
    return cluster_ids


def cluster_means(features: Tensor, cluster_ids: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """The mean of each cluster and its number of tokens.

    The sums are a product with the one-hot assignment, in fp64 and rounded once. A matrix product needs
    no atomics; fp64 keeps it out of reach of TF32 and autocast, and makes the rounded mean all but
    independent of the order of summation, which differs between devices and batch sizes.

    Args:
        features: (P, N, C), any floating dtype.
        cluster_ids: (P, N) int64 in [0, K).
        num_clusters: K.

    Returns:
        means (P, K, C) fp32, zero for an empty cluster, and sizes (P, K) int64. Does not synchronise.
    """
    clusters = torch.arange(num_clusters, device=features.device).unsqueeze(-1)
    one_hot = (cluster_ids.unsqueeze(1) == clusters).double()  # (P, K, N)
    sums = one_hot @ features.double()  # (P, K, C)
    sizes = cluster_sizes(cluster_ids, num_clusters)
    return (sums / sizes.clamp(min=1).unsqueeze(-1)).float(), sizes


def cluster_sizes(cluster_ids: Tensor, num_clusters: int) -> Tensor:
    """The number of tokens of each cluster: (P, N) int64 in [0, K) to (P, K) int64. Does not synchronise."""
    # Integer sums do not depend on their order, so the atomics of scatter_add are deterministic here.
    zeros = cluster_ids.new_zeros(cluster_ids.shape[0], num_clusters)
    return zeros.scatter_add(1, cluster_ids, torch.ones_like(cluster_ids))


def _nearest(features: Tensor, centroids: Tensor) -> Tensor:
    # The matrix-product form of the distance cancels digits and breaks ties by rounding.
    distances = torch.cdist(features, centroids, compute_mode="donot_use_mm_for_euclid_dist")  # (P, N, K)
    return distances.argmin(dim=-1)  # the first of equal minima, on every device


def _check_grid(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ShapeError(f"a grid of {height} x {width} tokens: expected at least one row and one column")
