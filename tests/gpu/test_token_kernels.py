"""The token operators' CUDA kernels, launched through the driver. What they compute is also tested on the host."""

from __future__ import annotations

import pytest
import torch

from cat_pruning.plugins import cuda_launch
from cat_pruning.plugins.token_ops import token_gather, token_scatter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device here"),
]

DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [  # (B, N, n, D)
    (1, 1, 1, 1),
    (2, 4429, 1561, 1536),  # SD3-medium's caches: 4096 image tokens, 333 text rows
    (2, 4096, 1228, 64),  # and its noise
    (3, 40, 40, 6),
    (2, 333, 17, 1540),
    (5, 9, 0, 16),
    (70000, 2, 1, 8),  # more rows of a batch than a grid's y may have blocks
]


def make(
    size: tuple[int, int, int, int], dtype: torch.dtype, index_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, indices and rows on the device."""
    batch, num_tokens, num_kept, width = size
    generator = torch.Generator().manual_seed(sum(size))
    indices = torch.rand(batch, num_tokens, generator=generator).argsort(1)[:, :num_kept].contiguous()
    tokens, rows = (
        torch.randn(batch, count, width, generator=generator).to(DEVICE, dtype) for count in (num_tokens, num_kept)
    )
    return tokens, indices.to(DEVICE, index_dtype), rows


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_kernels_equal_torch(size: tuple[int, int, int, int], dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    tokens, indices, rows = make(size, dtype, index_dtype)
    assert torch.equal(cuda_launch.gather(tokens, indices), token_gather(tokens, indices))
    expected = token_scatter(tokens, indices, rows)
    assert cuda_launch.scatter_(tokens, indices, rows) is tokens
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_indices_outside_are_left_alone(index_dtype: torch.dtype) -> None:
    limits = torch.iinfo(index_dtype)
    indices = torch.tensor([[limits.min, -1, 0, 4, 5, limits.max]], dtype=index_dtype, device=DEVICE)
    tokens, rows = torch.randn(1, 5, 8, device=DEVICE), torch.randn(1, 6, 8, device=DEVICE)
    expected = tokens.clone()
    expected[0, [0, 4]] = rows[0, 2:4]
    cuda_launch.scatter_(tokens, indices, rows)
    assert torch.equal(tokens, expected)
    assert torch.equal(cuda_launch.gather(tokens, indices)[0, 2:4], expected[0, [0, 4]])


def test_launches_follow_the_current_stream() -> None:
    tokens, indices, rows = make((2, 4429, 1561, 1536), torch.bfloat16, torch.int32)
    expected = token_gather(token_scatter(tokens, indices, rows), indices)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        cuda_launch.scatter_(tokens, indices, rows)
        gathered = cuda_launch.gather(tokens, indices)
    stream.synchronize()
    assert torch.equal(gathered, expected)


def test_launches_are_captured_into_a_cuda_graph() -> None:
    tokens, indices, rows = make((2, 333, 100, 1536), torch.bfloat16, torch.int32)
    cuda_launch.scatter_(tokens.clone(), indices, rows)  # loads the kernel, which no capture may do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda_launch.scatter_(tokens, indices, rows)
    rows.copy_(torch.randn_like(rows))
    expected = token_scatter(tokens, indices, rows)
    graph.replay()
    assert torch.equal(tokens, expected)


def test_self_test_passes() -> None:
    cuda_launch.plugin_self_test(DEVICE)
