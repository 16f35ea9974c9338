from __future__ import annotations

import itertools
import mmap
import re
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from cuda.bindings import nvjitlink
from torch import Tensor

from cat_pruning.errors import EngineError, ShapeError
from cat_pruning.plugins import cuda_kernels
from cat_pruning.plugins.cuda_kernels import GATHER, SCATTER, Specialization, compile_ptx, num_blocks
from cat_pruning.plugins.cuda_launch import Launch, self_test_cases
from cat_pruning.plugins.token_ops import token_gather, token_scatter

Run = Callable[[Launch], None]

SPECIALIZATIONS = [Specialization(word, index) for word, index in itertools.product((16, 8, 4, 2), (4, 8))]
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
POINTER, INTEGER = ".u64", ".u32"
PARAMETERS = {
    GATHER: [POINTER] * 2 + [INTEGER] * 4 + [POINTER],
    SCATTER: [POINTER] * 3 + [INTEGER] * 4 + [POINTER],
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [  # (B, N, n, D)
    (1, 1, 1, 1),
    (2, 16, 5, 8),
    (3, 40, 40, 3),
    (1, 65, 64, 33),
    (4, 33, 31, 127),
    (2, 12, 7, 1536),
    (2, 12, 7, 1540),
    (5, 9, 0, 16),
    (70, 4, 2, 6),
]


def sorted_kept(batch: int, num_tokens: int, num_kept: int, generator: torch.Generator) -> Tensor:
    return shuffled(batch, num_tokens, num_kept, generator).sort(1).values


def shuffled(batch: int, num_tokens: int, num_kept: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, num_tokens, generator=generator).argsort(1)[:, :num_kept].contiguous()


def last(batch: int, num_tokens: int, num_kept: int, generator: torch.Generator) -> Tensor:
    return torch.arange(num_tokens - num_kept, num_tokens).expand(batch, -1).contiguous()


class Fenced:
    """A tensor amid a memory of its own, whose other elements must not change."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, shift: int, generator: torch.Generator) -> None:
        count = torch.Size(shape).numel()
        self.memory = torch.randn(64 + shift + count + 64, generator=generator).to(dtype)
        self.before = self.memory.clone()
        self._rows = slice(64 + shift, 64 + shift + count)
        self.tensor = self.memory[self._rows].view(shape)

    def expect(self, tensor: Tensor) -> None:
        expected = self.before.clone()
        expected[self._rows] = tensor.flatten()
        assert torch.equal(self.memory, expected)


@pytest.mark.parametrize("pattern", [sorted_kept, shuffled, last])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_kernels_equal_torch_and_touch_nothing_else(
    run_on_host: Run,
    pattern: Callable[..., Tensor],
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    shift: int,
) -> None:
    batch, num_tokens, num_kept, width = size
    generator = torch.Generator().manual_seed(sum(size) + shift)
    indices = pattern(batch, num_tokens, num_kept, generator).to(index_dtype)
    tokens = Fenced((batch, num_tokens, width), dtype, shift, generator)
    rows = Fenced((batch, num_kept, width), dtype, 2 * shift, generator)
    gathered = Fenced((batch, num_kept, width), dtype, shift, generator)
    expected_gathered = token_gather(tokens.tensor, indices)
    expected_tokens = token_scatter(tokens.tensor, indices, rows.tensor)
    run_on_host(Launch.gather(tokens.tensor, indices, gathered.tensor))
    gathered.expect(expected_gathered)
    tokens.expect(tokens.tensor)
    run_on_host(Launch.scatter(tokens.tensor, indices, rows.tensor))
    tokens.expect(expected_tokens)
    rows.expect(rows.tensor)


def test_indices_outside_are_left_alone(run_on_host: Run) -> None:
    for index_dtype in (torch.int32, torch.int64):
        limits = torch.iinfo(index_dtype)
        indices = torch.tensor([[limits.min, -1, 0, 4, 5, limits.max]], dtype=index_dtype)
        generator = torch.Generator().manual_seed(0)
        tokens, rows = (Fenced((1, count, 8), torch.float32, 0, generator) for count in (5, 6))
        gathered = Fenced((1, 6, 8), torch.float32, 0, generator)
        run_on_host(Launch.gather(tokens.tensor, indices, gathered.tensor))
        run_on_host(Launch.scatter(tokens.tensor, indices, rows.tensor))
        expected = gathered.before[64:-64].view(1, 6, 8).clone()
        expected[0, 2:4] = tokens.before[64:-64].view(1, 5, 8)[0, [0, 4]]
        gathered.expect(expected)
        expected = tokens.before[64:-64].view(1, 5, 8).clone()
        expected[0, [0, 4]] = rows.tensor[0, 2:4]
        tokens.expect(expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reserves memory that it never touches")
@pytest.mark.parametrize(("batch", "num_tokens", "width"), [(1, 2**20 + 1, 4099), (3, 2**30, 1)])
def test_offsets_of_more_than_32_bits(run_on_host: Run, batch: int, num_tokens: int, width: int) -> None:
    # Words of two bytes, as many as possible in as little memory; only the pages of a few rows are touched.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python knows since 3.13
    memory = np.frombuffer(mmap.mmap(-1, 2 * batch * num_tokens * width, flags=flags), np.int16)
    tokens = torch.from_numpy(memory).view(torch.bfloat16).view(batch, num_tokens, width)
    indices = torch.tensor([[num_tokens - 1, 0, num_tokens // 2]] * batch)
    rows = torch.randn(batch, 3, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    launch = Launch.scatter(tokens, indices, rows)
    assert launch.specialization == Specialization(2, 8)
    run_on_host(launch)
    gathered = torch.empty_like(rows)
    run_on_host(Launch.gather(tokens, indices, gathered))
    assert torch.equal(gathered, rows)
    for row in range(batch):
        for i, index in enumerate(indices[row].tolist()):
            assert torch.equal(tokens[row, index], rows[row, i])


def test_self_test_cases_pass_on_the_host_and_use_every_specialization(run_on_host: Run) -> None:
    seen = set()
    for name, tokens, indices, rows in self_test_cases(torch.device("cpu")):
        launch = Launch.scatter(tokens, indices, rows)
        seen.add(launch.specialization)
        gathered, expected = torch.empty_like(rows), token_gather(tokens, indices)
        run_on_host(Launch.gather(tokens, indices, gathered))
        assert torch.equal(gathered, expected), name
        expected = token_scatter(tokens, indices, rows)
        run_on_host(launch)
        assert torch.equal(tokens, expected), name
    assert seen == set(SPECIALIZATIONS)


@pytest.mark.parametrize(
    ("element_bytes", "width", "word_bytes"),
    [
        *[(4, 1536, 16), (2, 1536, 16), (2, 8, 16), (2, 12, 8), (4, 6, 8), (4, 3, 4), (2, 6, 4), (2, 3, 2)],
        *[(4, -1, 4), (2, -1, 2)],  # a width that is known at run time only
    ],
)
def test_words_are_the_widest_that_a_row_is_made_of(element_bytes: int, width: int, word_bytes: int) -> None:
    assert Specialization.of(element_bytes, width, 4) == Specialization(word_bytes, 4)


def test_other_elements_and_indices_are_refused() -> None:
    with pytest.raises(EngineError, match="elements of 1 bytes, expected fp32, fp16 or bf16"):
        Specialization.of(1, 16, 4)
    with pytest.raises(EngineError, match="indices have 2 bytes, expected int32 or int64"):
        Specialization.of(2, 16, 2)


def wrong_launches() -> Iterator[tuple[type[Exception], str, tuple[Tensor, Tensor, Tensor]]]:
    tokens, indices, rows = torch.zeros(2, 5, 4), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3, 4)
    yield ShapeError, r"\[2, 5, 8\]", (torch.zeros(2, 5, 8), indices, rows)
    yield ShapeError, r"\[3, 5, 4\]", (torch.zeros(3, 5, 4), indices, rows)
    yield ShapeError, "not contiguous", (torch.zeros(2, 4, 5).transpose(1, 2), indices, rows)
    yield ShapeError, "not on one device", (tokens, indices.to("meta"), rows)
    yield EngineError, "torch.int16", (tokens, indices.short(), rows)
    yield EngineError, "rows of torch.float16", (tokens, indices, rows.half())
    yield EngineError, "tokens of torch.int32", (tokens.int(), indices, rows.int())
    yield ShapeError, "at most 2147483647", (torch.empty(1, 1, 1).expand(1, 2**31, 1)[:, :, :0], *_nothing())


def _nothing() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 0, dtype=torch.int32), torch.zeros(1, 0, 0)


@pytest.mark.parametrize(("error", "message", "tensors"), list(wrong_launches()))
def test_launches_that_do_not_fit_are_refused(
    error: type[Exception], message: str, tensors: tuple[Tensor, Tensor, Tensor]
) -> None:
    with pytest.raises(error, match=message):
        Launch.scatter(*tensors)


def test_a_gather_into_strided_memory_is_refused() -> None:
    tokens, indices = torch.zeros(2, 5, 4), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ShapeError, match="token_gather got tensors that are not contiguous"):
        Launch.gather(tokens, indices, torch.zeros(2, 4, 3).transpose(1, 2))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_kept", [0, 1, 7, 8, 9, 4096])
def test_the_grid_covers_every_row_and_is_never_empty(batch: int, num_kept: int) -> None:
    blocks = num_blocks(batch, num_kept)
    assert max(batch * num_kept, 1) <= blocks * cuda_kernels.ROWS_PER_BLOCK <= batch * num_kept + 8


@pytest.mark.parametrize("specialization", SPECIALIZATIONS, ids=str)
def test_ptx_is_for_the_oldest_architecture_and_declares_what_a_launch_passes(specialization: Specialization) -> None:
    ptx = compile_ptx(specialization)
    assert re.findall(r"(?m)^\.(?:version|target) .*$", ptx) == [".version 8.0", ".target sm_75"]
    entries = dict(re.findall(r"\.entry (\w+)\(([^)]*)\)", ptx))
    declared = {name: re.findall(r"\.param (\.\w+)", text) for name, text in entries.items()}
    assert declared == {specialization.entry(kernel): parameters for kernel, parameters in PARAMETERS.items()}
    widest = {16: ".v4.u32", 8: ".v2.u32", 4: ".u32", 2: ".u16"}[specialization.word_bytes]
    for name in entries:
        body = ptx.split(f".entry {name}(")[1].split(".entry")[0]
        assert len(re.findall(rf"st\.global\{widest}", body)) == 4 + (specialization.word_bytes == 2)
        assert len(re.findall(rf"ld\.global\.nc\{widest}", body)) >= 4
    assert not re.search(r"\b(atom|bar|call|\.shared|\.local)\b", ptx)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("specialization", SPECIALIZATIONS, ids=str)
def test_ptx_assembles_for_every_architecture(specialization: Specialization, architecture: int) -> None:
    assert assemble(compile_ptx(specialization), architecture) > 0


def test_no_two_variants_share_a_name() -> None:
    assert len(
        {specialization.entry(kernel) for specialization in SPECIALIZATIONS for kernel in PARAMETERS}
    ) == 2 * len(SPECIALIZATIONS)


def test_the_assembler_holds_instructions_against_the_stamp() -> None:
    ptx = compile_ptx(Specialization(16, 4)).replace(
        "\tret;", "\tfence.proxy.tensormap::generic.release.gpu;\n\tret;", 1
    )
    with pytest.raises(nvjitlink.nvJitLinkError):
        assemble(ptx, 90)


def assemble(ptx: str, architecture: int) -> int:
    """Bytes of machine code. NVIDIA's assembler checks every instruction against the stamped version."""
    handle = nvjitlink.create(1, [f"-arch=sm_{architecture}"])
    try:
        text = ptx.encode() + b"\0"
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, text, len(text), "token_rows.ptx")
        nvjitlink.complete(handle)
        return int(nvjitlink.get_linked_cubin_size(handle))
    finally:
        nvjitlink.destroy(handle)


def test_nvrtc_says_what_it_does_not_understand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "kernel_source", lambda: "__global__ void token_gather() { nonsense; }")
    with pytest.raises(
        EngineError, match=r'refused token_rows.cu with .*compute_75.*identifier "nonsense" is undefined'
    ):
        compile_ptx.__wrapped__(Specialization(16, 4))


def test_without_nvrtc_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.delattr("cuda.bindings.nvrtc", raising=False)  # not there before another test imports it
    with pytest.raises(EngineError, match=r"pip install 'cat-pruning\[tensorrt\]'"):
        compile_ptx.__wrapped__(Specialization(16, 4))
