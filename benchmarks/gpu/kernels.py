"""The parts of a step alone: matrix products and attention at its sizes, the token operators."""

from __future__ import annotations

import functools
import statistics
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing import REPEATS, Run, graph_of, interleaved, medians
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.setting import Results, Setting

LAUNCHES = 10  # in one captured graph, so that the host's time is in none of it
# Rows of SD3-medium's products for two rows of the batch: 4096 tokens, 1228, 1280, and the text.
GEMM_ROWS = {"full": 2 * 4096, "pruned": 2 * 1228, "pruned, 1280": 2 * 1280, "text": 2 * 333}
WIDTH = 1536
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass(frozen=True)
class Attention:
    """The sizes of a model's attention at 1024x1024. text: rows of it that are queries and keys too."""

    batch: int
    heads: int
    width: int  # of a head
    text: int
    tokens: int = 4096
    kept: int = 1228


ATTENTIONS = {
    "sd3": Attention(2, 24, 64, 333),
    "pixart-sigma": Attention(2, 16, 72, 0),
    "flux-dev": Attention(1, 24, 128, 512),
}
TINY_ATTENTIONS = {"tiny": Attention(2, 2, 8, 7, 64, 19)}


def matmul_rate(setting: Setting) -> Results:
    """The card's bf16 rate on square matrices, to hold the steps' against: the best of the sizes' medians."""
    rates = {}
    for size in (64,) if setting.tiny else (4096, 8192, 16384):
        rates[size] = matmul_tflops(size, setting)
        yield f"{size}^3", rates[size]
    yield "bf16_tflops", max(rates.values())


def matmul_tflops(size: int, setting: Setting) -> float:
    """TFLOP/s of a square bf16 product of random matrices."""
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=setting.device) for _ in range(2))
    multiply = functools.partial(torch.mm, left, right, out=torch.empty_like(left))
    times = interleaved({"mm": multiply}, setting.rounds, setting.device, REPEATS)
    return 2 * size**3 / statistics.median(times["mm"]) / 1e9


def gemms(setting: Setting) -> Results:
    """The products of a block of SD3-medium, bias included, by rows; with GELU after them and in them.

    Ten launches of each in one graph; what a launch reads may be found in the second-level cache, as in a step.
    """
    width, divisor = (WIDTH // 48, 128) if setting.tiny else (WIDTH, 1)
    for title, of_full in GEMM_ROWS.items():
        rows = of_full // divisor
        runs: dict[str, Run] = {}
        flops: dict[str, int] = {}
        for inputs, outputs in ((width, width), (width, 3 * width), (width, 4 * width), (4 * width, width)):
            made = _products(setting, rows, inputs, outputs, with_gelu=outputs == 4 * width)
            runs |= {name: launches(run, setting) for name, run in made.items()}
            flops |= dict.fromkeys(made, 2 * rows * inputs * outputs)
        times = interleaved(runs, setting.rounds, setting.device)
        yield title, {"rows": rows, **_rates(times, flops)}


def _products(setting: Setting, rows: int, inputs: int, outputs: int, with_gelu: bool) -> dict[str, Run]:
    """The product of random rows with a layer's weights, its bias added; with GELU too where it has one."""
    x, weight, bias = (_random(setting, *shape) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    name = f"{inputs}→{outputs}"
    made: dict[str, Run] = {name: functools.partial(torch.addmm, bias, x, weight.t())}
    if with_gelu:
        made[f"{name}, then GELU"] = functools.partial(_gelu_after, bias, x, weight)
        fused = functools.partial(torch._addmm_activation, bias, x, weight.t(), use_gelu=True)
        made[f"{name} with GELU"] = fused
    return made


def _random(setting: Setting, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=setting.dtype, device=setting.device) * 0.1


def _gelu_after(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return F.gelu(torch.addmm(bias, x, weight.t()), approximate="tanh")


def launches(run: Run, setting: Setting) -> Run:
    """`run` ten times over, captured as one on a GPU."""

    @torch.no_grad()
    def ten_times() -> None:
        for _ in range(LAUNCHES):
            run()

    ten_times()
    return graph_of(ten_times, setting.device)


def _rates(times: dict[str, list[float]], flops: dict[str, int]) -> dict[str, Any]:
    """Of runs of ten launches each."""
    ms = {name: each / LAUNCHES for name, each in medians(times).items()}
    return {"ms": ms, "tflops": {name: flops[name] / each / 1e9 for name, each in ms.items()}}


def attention(setting: Setting) -> Results:
    """Attention of full and pruned steps by torch's backends, in the layout that the engine has it in."""
    for model, sizes in (TINY_ATTENTIONS if setting.tiny else ATTENTIONS).items():
        for kind, image_rows in (("full", sizes.tokens), ("pruned", sizes.kept)):
            queries, keys = image_rows + sizes.text, sizes.tokens + sizes.text
            runs, refused = _attention_runs(setting, sizes, queries, keys)
            flops = 4 * sizes.batch * sizes.heads * queries * keys * sizes.width
            times = interleaved(runs, setting.rounds, setting.device)
            yield (
                f"{model}, {kind}",
                {"queries": queries, "keys": keys, **_rates(times, dict.fromkeys(runs, flops)), "refused": refused},
            )


def _attention_runs(
    setting: Setting, sizes: Attention, queries: int, keys: int
) -> tuple[dict[str, Run], dict[str, str]]:
    """What each backend that takes these sizes runs, and why the others do not."""

    def heads(rows: int) -> Tensor:
        return _random(setting, sizes.batch, rows, sizes.heads, sizes.width).transpose(1, 2)

    query, key, value = heads(queries), heads(keys), heads(keys)
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for backend in BACKENDS:

        def attend(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value)

        try:
            with warnings.catch_warnings(action="ignore"):  # they say why a backend refuses, and nothing else
                runs[backend.name] = launches(attend, setting)
        except RuntimeError as error:
            refused[backend.name] = str(error).splitlines()[0]
    return runs, refused


def caches(setting: Setting) -> Results:
    """Keys and values written to their caches and attended to: the caches in the activations' dtype, and in float8.

    Attention takes no float8, so that all of such a cache is converted for it.
    """
    for model, sizes in (TINY_ATTENTIONS if setting.tiny else ATTENTIONS).items():
        for kind, image_rows in (("full", sizes.tokens), ("pruned", sizes.kept)):
            written, total = image_rows + sizes.text, sizes.tokens + sizes.text
            rows = torch.arange(written, device=setting.device) * total // written
            runs = {
                name: launches(_cached_attention(setting, sizes, rows, total, dtype), setting)
                for name, dtype in ((str(setting.dtype), setting.dtype), ("float8", torch.float8_e4m3fn))
            }
            times = interleaved(runs, setting.rounds, setting.device)
            yield f"{model}, {kind}", {"ms": {name: each / LAUNCHES for name, each in medians(times).items()}}


def _cached_attention(setting: Setting, sizes: Attention, rows: Tensor, total: int, dtype: torch.dtype) -> Run:
    """Write as many `rows` of keys and of values into caches of `total` rows, and attend to those."""
    shape = (sizes.batch, len(rows), sizes.heads * sizes.width)
    query, key, value = (_random(setting, *shape) for _ in range(3))
    bits = {2: torch.int16, 4: torch.int32, 1: torch.int8}[dtype.itemsize]
    keys, values = (query.new_zeros(sizes.batch, total, shape[2], dtype=dtype) for _ in range(2))

    def heads(x: Tensor) -> Tensor:
        return x.view(sizes.batch, -1, sizes.heads, sizes.width).transpose(1, 2)

    def attend() -> Tensor:
        for cache, new in ((keys, key), (values, value)):
            cache.view(bits).index_copy_(1, rows, new.to(dtype).view(bits))
        key_heads, value_heads = (heads(cache.to(setting.dtype)) for cache in (keys, values))
        return F.scaled_dot_product_attention(heads(query), key_heads, value_heads)

    return attend


def token_kernels(setting: Setting) -> Results:
    """Gather and scatter, torch's and ours, against a copy of the same bytes: `bench_token_kernels`."""
    import bench_token_kernels

    for name in bench_token_kernels.DTYPES:
        yield name, bench_token_kernels.measure(name, setting.device, setting.rounds)
