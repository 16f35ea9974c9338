from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cat_pruning.errors import SettingsError, ShapeError
from cat_pruning.runtime.selection.kmeans import cluster_means, cluster_sizes, initial_tokens, kmeans, position_encoding

_GRIDS = [(4, 4), (16, 16), (8, 12), (5, 1), (64, 64)]


def lloyd(points: NDArray[np.float64], initial: list[int], iterations: int) -> list[int]:
    """KMeans of one row, slowly and in fp64."""
    centroids = [points[token].copy() for token in initial]

    def nearest(point: NDArray[np.float64]) -> int:
        distances = [float(((point - centroid) ** 2).sum()) for centroid in centroids]
        return distances.index(min(distances))

    ids = [nearest(point) for point in points]
    for _ in range(iterations):
        for cluster in range(len(centroids)):
            members = [points[token] for token, own in enumerate(ids) if own == cluster]
            if members:
                centroids[cluster] = np.mean(members, axis=0)
        ids = [nearest(point) for point in points]
    return ids


def blobs(num_blobs: int, per_blob: int, channels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Far apart, tight: (1, N, C), and the blob of each token."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(num_blobs).repeat(per_blob)
    centres = 50.0 * torch.randn(num_blobs, channels, generator=generator)
    return (centres[owner] + torch.randn(owner.shape[0], channels, generator=generator))[None], owner


def test_position_encoding_is_the_papers() -> None:
    encoding = position_encoding(2, 4, 6, "cpu")
    assert encoding.shape == (8, 6)
    assert encoding.dtype == torch.float32
    for row in range(2):
        for column in range(4):
            assert encoding[row * 4 + column].tolist() == [row / 2] * 3 + [column / 4] * 3


def test_position_encoding_of_odd_channels_gives_the_odd_one_to_the_columns() -> None:
    assert position_encoding(2, 2, 3)[2].tolist() == [0.5, 0.0, 0.0]
    assert position_encoding(2, 2, 3)[1].tolist() == [0.0, 0.5, 0.5]


@pytest.mark.parametrize(("height", "width", "channels"), [(0, 4, 4), (4, 0, 4), (4, 4, 1)])
def test_position_encoding_refuses_what_has_no_positions(height: int, width: int, channels: int) -> None:
    with pytest.raises(ShapeError):
        position_encoding(height, width, channels)


@pytest.mark.parametrize(("height", "width"), _GRIDS)
@pytest.mark.parametrize("num_clusters", [1, 2, 20])
def test_initial_tokens_are_on_the_image(height: int, width: int, num_clusters: int) -> None:
    tokens = initial_tokens(height, width, num_clusters)
    assert tokens.shape == (num_clusters,)
    assert tokens.dtype == torch.int64
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < height * width


def test_initial_tokens_are_the_r2_sequence() -> None:
    # frac(0.5 + k * 0.7548776662...) and frac(0.5 + k * 0.5698402909...) for k = 0, 1, 2
    expected = [(0.5, 0.5), (0.2548776662, 0.0698402909), (0.0097553324, 0.6396805819)]
    tokens = initial_tokens(100, 1000, 3)
    assert tokens.tolist() == [int(row * 100) * 1000 + int(column * 1000) for row, column in expected]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 32), (64, 64)])
def test_initial_tokens_are_spread(height: int, width: int) -> None:
    tokens = initial_tokens(height, width, 20)
    assert tokens.unique().numel() == 20
    quadrants = 2 * (tokens // width >= height // 2) + (tokens % width >= width // 2)
    assert quadrants.bincount(minlength=4).min() >= 4  # of 20, in every quarter of the image


def test_initial_tokens_refuses_what_it_cannot_place() -> None:
    with pytest.raises(SettingsError, match="num_clusters=0"):
        initial_tokens(4, 4, 0)
    with pytest.raises(ShapeError):
        initial_tokens(0, 4, 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_equals_a_plain_lloyd(seed: int, iterations: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 60, 4, generator=generator)
    initial = torch.randperm(60, generator=generator)[:7]
    ids = kmeans(features, initial, iterations)
    assert ids.dtype == torch.int64
    for row in range(2):
        assert ids[row].tolist() == lloyd(features[row].double().numpy(), initial.tolist(), iterations)


def test_equals_scipy_on_separated_data() -> None:
    vq = pytest.importorskip("scipy.cluster.vq")
    features, owner = blobs(5, 12, 6, seed=0)
    initial = torch.arange(5)  # one token of each blob
    _, expected = vq.kmeans2(features[0].double().numpy(), features[0, initial].double().numpy(), 10, minit="matrix")
    ids = kmeans(features, initial, 10)[0]
    assert ids.tolist() == expected.tolist() == owner.tolist()


def test_separated_blobs_are_found_from_a_bad_start() -> None:
    features, owner = blobs(2, 20, 3, seed=1)
    ids = kmeans(features, torch.tensor([0, 2]), 10)[0]  # both in the first blob
    assert len({(int(cluster), int(blob)) for cluster, blob in zip(ids, owner, strict=True)}) == 2


def test_a_tie_goes_to_the_lowest_cluster() -> None:
    features = torch.tensor([[[0.0], [2.0], [1.0]]])
    assert kmeans(features, torch.tensor([1, 0]), 1).tolist() == [[1, 0, 0]]


def test_equal_tokens_are_all_of_cluster_0() -> None:
    assert kmeans(torch.zeros(2, 9, 4), torch.arange(3), 5).tolist() == [[0] * 9] * 2


def test_an_empty_cluster_keeps_its_centroid_and_may_win_tokens_back() -> None:
    # Both clusters start at 100 and the tie leaves the second empty; the first moves to 107, and the second gets 100.
    features = torch.tensor([[[100.0], [110.0], [111.0]]])
    assert kmeans(features, torch.tensor([0, 0]), 1).tolist() == [[1, 0, 0]]


def test_as_many_clusters_as_tokens_and_a_single_one() -> None:
    features = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0))
    assert kmeans(features, torch.arange(8), 3).tolist() == [list(range(8))]
    assert kmeans(features, torch.tensor([3]), 3).tolist() == [[0] * 8]


def test_rows_are_independent_and_runs_equal() -> None:
    height, width = 16, 12
    features = torch.randn(4, height * width, 16, generator=torch.Generator().manual_seed(3))
    initial = initial_tokens(height, width, 20)
    together = kmeans(features, initial, 10)
    assert torch.equal(together, kmeans(features, initial, 10))
    for row in range(4):
        assert torch.equal(together[row : row + 1], kmeans(features[row : row + 1], initial, 10))


def test_autocast_does_not_reach_it() -> None:
    features = torch.randn(1, 256, 16, generator=torch.Generator().manual_seed(4))
    initial = initial_tokens(16, 16, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kmeans(features, initial, 10)
        means, _ = cluster_means(features, inside, 20)
    assert torch.equal(inside, kmeans(features, initial, 10))
    assert torch.equal(means, cluster_means(features, inside, 20)[0])


def test_an_offset_does_not_cost_the_digits_that_matter() -> None:
    features = 4096.0 + torch.randn(1, 60, 4, generator=torch.Generator().manual_seed(5))
    assert kmeans(features, torch.arange(7), 3)[0].tolist() == lloyd(features[0].double().numpy(), list(range(7)), 3)


def test_refuses_no_iterations() -> None:
    with pytest.raises(SettingsError, match="iterations=0"):
        kmeans(torch.zeros(1, 4, 2), torch.tensor([0]), 0)


def test_cluster_means_and_sizes() -> None:
    features = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [5.0, 5.0]]])
    ids = torch.tensor([[2, 2, 0]])
    means, sizes = cluster_means(features, ids, 4)
    assert means.tolist() == [[[5.0, 5.0], [0.0, 0.0], [2.0, 4.0], [0.0, 0.0]]]
    assert means.dtype == torch.float32
    assert sizes.tolist() == cluster_sizes(ids, 4).tolist() == [[1, 0, 2, 0]]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_neither_synchronises_nor_leaves_its_device(device: str) -> None:
    # Fake tensors have no values: .item(), nonzero and boolean masks fail, and so does a constant left on the host.
    with FakeTensorMode():
        features = torch.empty(2, 24, 8, device=device) + position_encoding(4, 6, 8, device)
        ids = kmeans(features, initial_tokens(4, 6, 5, device), 3)
    assert ids.shape == (2, 24)
    assert ids.dtype == torch.int64
    assert ids.device.type == device
