"""The GPU's benchmarks at sizes for a CPU: every measurement runs to its end; the bounds are the committed MACs'."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import bench_gpu
import pytest
import timing
import torch
from deaf_device import DEAF, HostTraffic, deaf
from gpu import bounds, fast, kernels, memory, peers, profiles, setting, steps, text_encoders
from gpu.case import Case, forget_shared, shared_case
from gpu.setting import LARGE_MODEL, MODELS, Setting

from cat_pruning.engines import cuda_graphs, torch_engine
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings

# Of diffusers' schedulers, of the pair of torch and numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--tiny", "--rounds", "1", "--steps", "10"]
NEEDS_A_GPU = ("kernels",)
COMPILE = ("compile", "autotune", "regional", "fast", "float8")  # which takes a compiler, and minutes
OF_BOTH_MODELS = ("steps", "diffusers")  # whole images of both are below


@pytest.fixture(autouse=True, scope="module")
def _nothing_stays() -> Iterator[None]:
    yield
    peers.forget_peers()
    forget_shared()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of every measurement but those that need a GPU or its compiler."""
    out = tmp_path_factory.mktemp("results") / "bench.json"
    content: dict[str, Any] = {}
    patch = pytest.MonkeyPatch()
    patch.setattr(torch_engine, "compile_blocks", lambda transformer: None)
    for names, models in (
        (OF_BOTH_MODELS, MODELS),
        ([name for name in bench_gpu.MEASUREMENTS if name not in (*NEEDS_A_GPU, *COMPILE, *OF_BOTH_MODELS)], ("sd3",)),
    ):
        of_models = [argument for model in models for argument in ("--model", model)]
        assert bench_gpu.main([*names, *TINY, *of_models, "--out", str(out)]) == 0
        written = json.loads(out.read_text())
        assert list(written) == list(names)
        content |= written
    patch.undo()
    return content


@pytest.mark.long
def test_steps(results: dict[str, Any]) -> None:
    for model in MODELS:
        for captured in ("with CUDA graphs", "without CUDA graphs"):
            times = results["steps"][model][captured]
            assert set(times["ms"]) == {"full", "pruned", "selection"}
            assert times["of_bound"] == pytest.approx(times["speedup"] / times["mac_bound"])
        assert set(results["steps"][model]["attention"]) == {"full", "pruned"}
        assert not results["steps"][model]["attention"]["full"].isdigit()


@pytest.mark.long
def test_loops_and_peers(results: dict[str, Any]) -> None:
    for model in MODELS:
        assert results["diffusers"][model]["diffusers"]["over_ours"]["full"] > 0
    assert set(results["loops"]["sd3"]["10 steps, with CUDA graphs"]["ms"]) == {"full", "CAT"}
    assert results["synchronisations"]["sd3"]["with CUDA graphs"] == "none in steps 2 to 10"
    assert results["matmul"]["bf16_tflops"] > 0
    assert set(results["selection"]["ms"]) == {"selection", "kmeans"}
    assert set(results["peer-loops"]["sd3"]["10 steps"]["ms"]) == {"diffusers", "full", "CAT"}


@pytest.mark.long
def test_what_is_measured_by_size(results: dict[str, Any]) -> None:
    sizes = results["sizes"]["sd3"]
    counted = [(each["tokens"], each["kept"]) for each in sizes.values()]
    assert counted == [(16, 4), (64, 19), (144, 43), (64, 19), (64, 19)]
    counts = list(results["kept"]["sd3"]["ms"])
    assert counts == [str(count) for count in sorted({of_4096 // 64 for of_4096 in steps.KEPT})]
    assert results["kept"]["sd3"]["of_16"]["16"] == 1
    # A session keeps the graphs of so many kinds of steps; the full one is another.
    assert len(steps.KEPT) < cuda_graphs.MOST_GRAPHS


@pytest.mark.long
def test_presets_memory_and_threads(results: dict[str, Any]) -> None:
    presets = results["presets"]["sd3"]["10 steps"]
    assert set(presets["ms"]) == {"full", "CAT", "refreshed", "forecast", "fewer steps"}
    assert presets["fewer_steps"] == bounds.fewer_steps("sd3", 10, PruneSettings())
    case = shared_case(a_setting("sd3"))
    held = results["memory"]["sd3"]
    assert held["weights_gb"] == pytest.approx(sum(each.nbytes for each in case.transformer.parameters()) / 1e9)
    session: Any = case.begun(case.engine())
    assert held["caches_gb"] == pytest.approx(sum(cache.nbytes for cache in session._caches) / 1e9)
    assert results["threads"]["sd3"]["largest_difference_from_alone"] == 0
    assert results["threads"]["sd3"]["images_per_second"]["two threads"] > 0


@pytest.mark.long
def test_the_parts_of_a_step(results: dict[str, Any]) -> None:
    assert list(results["gemms"]) == list(kernels.GEMM_ROWS)
    assert len(results["gemms"]["full"]["tflops"]) == 6
    attention = results["attention"]["tiny, pruned"]
    assert (attention["queries"], attention["keys"]) == (26, 71)
    # A CPU has one of the three, and says so of the others.
    assert set(attention["ms"]) | set(attention["refused"]) == {backend.name for backend in kernels.BACKENDS}
    profile = results["profile"]["sd3"]["pruned, with CUDA graphs"]
    assert profile["classes"]["GEMM"]["share"] > profile["classes"]["sort and scan"]["share"] > 0
    assert sum(each["share"] for each in profile["classes"].values()) == pytest.approx(1)
    assert len(profile["longest"]) == profiles.TOP


@pytest.mark.long
def test_the_large_model_and_the_pipeline(results: dict[str, Any]) -> None:
    assert set(results["flux"]["10 steps, compiled"]["ms"]) == {"full", "CAT"}
    assert results["flux"]["steps, compiled"]["mac_bound"] == pytest.approx(2.65, abs=1e-2)
    times = results["pipeline"]["10 steps"]["ms"]
    assert times["diffusers, whole"] > 0
    assert set(times) == {
        "encode",
        "decode",
        *(f"{a}, {b}" for a in ("diffusers", "CAT", "CAT, compiled") for b in ("steps", "whole")),
    }


@pytest.mark.long
def test_every_number_is_one(results: dict[str, Any]) -> None:
    def numbers(value: Any) -> Iterator[float]:
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from numbers(each)
        if isinstance(value, float):
            yield value

    assert all(math.isfinite(number) and number >= 0 for number in numbers(results))


def test_one_that_fails_leaves_what_it_had_and_the_next_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(given: Setting) -> setting.Results:
        yield "ms", 1.0
        raise RuntimeError("CUDA error:\nout of it")

    monkeypatch.setitem(bench_gpu.MEASUREMENTS, "steps", failing)
    out = tmp_path / "out.json"
    assert bench_gpu.main(["steps", "matmul", "--model", "sd3", *TINY, "--out", str(out)]) == 1
    content = json.loads(out.read_text())
    assert content["steps"]["sd3"] == {"ms": 1.0, "failed": "RuntimeError: CUDA error: out of it"}
    assert content["matmul"]["bf16_tflops"] > 0
    assert capsys.readouterr().err.endswith("steps, sd3: RuntimeError: CUDA error: out of it\n")


def test_what_is_compiled_is_diffusers_module(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def compiled(module: Any, mode: str, dynamic: bool) -> Any:
        assert type(module).__module__.startswith("diffusers")
        modes.append(mode)
        return module

    peers.forget_peers()
    monkeypatch.setattr(torch, "compile", compiled)
    for name in ("compile", "autotune"):
        assert dict(bench_gpu.MEASUREMENTS[name](a_setting("sd3")))
    assert modes == ["default", "max-autotune-no-cudagraphs"]


@pytest.mark.long
@pytest.mark.parametrize("model", ["sd3", LARGE_MODEL])  # diffusers knows the blocks of the second one only
def test_blocks_compiled_compute_the_same(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole, as `fullgraph` asks for; compiled by what takes no compiler."""
    monkeypatch.setattr(
        torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    )
    case = Case(a_setting(model))
    peer = peers.peer_of(case, peers.REGIONAL)
    assert peers.peer_of(case, peers.REGIONAL) is peer
    assert all(block._compiled_call_impl is not None for block in peer.transformer_blocks)
    assert all(block._compiled_call_impl is None for block in case.transformer.transformer_blocks)
    timestep = torch.tensor(500.0)
    with torch.no_grad():
        torch.testing.assert_close(
            case.call(peer, case.rows, timestep), case.call(case.transformer, case.rows, timestep)
        )
    peers.forget_peers()


@pytest.mark.long
def test_engines_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing compiled for the compiled ones; what else they change is changed."""
    made = []
    monkeypatch.setattr(torch_engine, "compile_blocks", made.append)
    found = dict(fast.fast(a_setting("sd3")))
    names = ("plain", "compiled", "compiled, fused QKV")
    assert set(found["steps"]["ms"]) == {f"{name}, {kind}" for name in names for kind in ("full", "pruned")}
    errors = [found[f"{name}, error"]["pruned"] for name in names]
    assert all(error < 1e-5 for error in errors)
    assert any(errors[1:])
    assert found["profile of the compiled pruned step"]["classes"]["GEMM"]["share"] > 0
    assert {hasattr(each.transformer_blocks[0].attn, "to_qkv") for each in made} == {False, True}
    assert Case(a_setting("sd3").replace(compiled=True)).engine().compiled


def a_setting(model: str) -> Setting:
    return Setting(model, CPU, tiny=True, rounds=1, steps=(10,), prune=PruneSettings(num_clusters=5))


def test_the_bounds_are_the_macs() -> None:
    settings = PruneSettings()
    assert bounds.loop_bound("sd3", 28, settings) == pytest.approx(1.862, abs=1e-3)
    assert bounds.loop_bound("sd3", 50, settings) == pytest.approx(2.195, abs=1e-3)
    assert bounds.loop_bound("pixart-sigma", 28, settings) == pytest.approx(1.986, abs=1e-3)
    assert bounds.loop_bound("sd3", 28, settings.replace(full_steps=28)) == 1
    assert bounds.step_bound("pixart-sigma") == pytest.approx(3.28, abs=1e-2)
    assert bounds.fewer_steps("sd3", 28, settings) == 15
    assert bounds.fewer_steps("sd3", 28, settings.replace(full_steps=28)) == 28


def test_published_sizes_where_nothing_is_tiny() -> None:
    for model in MODELS:
        assert Setting(model, CPU).num_tokens == 4096
    assert Setting("sd3", CPU, pixels=1536).grid == (96, 96)


def test_the_sizes_of_attention_are_the_models() -> None:
    from cat_pruning.checkpoints.published import published_models

    for model, sizes in kernels.ATTENTIONS.items():
        published = published_models()[model]
        config = published.transformer
        assert (sizes.heads, sizes.width) == (config["num_attention_heads"], config["attention_head_dim"])
        assert sizes.text == (0 if model == "pixart-sigma" else published.text_length)
        assert sizes.kept == PruneSettings().num_kept(sizes.tokens)
        assert sizes.batch == (2 if published.family.batched_guidance else 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x1>(Params)", "GEMM"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(...)", "GEMM"),
        ("triton_tem_fused_addmm_3", "GEMM"),
        ("aten::addmm", "GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, cutlass::bfloat16_t>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("void at::native::_scatter_gather_elementwise_kernel<128, 8, ...>", "scatter and index"),
        ("void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<...>>", "scatter and index"),
        ("cat_token_scatter_16_i32", "scatter and index"),
        ("triton_poi_fused_index_put_4", "scatter and index"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl>", "elementwise and norm"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<...>", "elementwise and norm"),
        ("triton_red_fused__to_copy_add_mul_native_layer_norm_addmm_2", "elementwise and norm"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_clone_5", "elementwise and norm"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<...>", "elementwise and norm"),
        ("Memcpy DtoD (Device -> Device)", "elementwise and norm"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>", "sort and scan"),
        ("void cudnn::ops::convertTensor_kernel<...>", "other"),
    ],
)
def test_a_kernels_class_by_its_name(name: str, expected: str) -> None:
    assert profiles.kernel_class(name) == expected


def test_what_ran_on_the_gpu_by_the_profilers_events() -> None:
    """Only kernels, and each replay's share of them; neither what the host did nor a range that was named on it."""
    device_type = torch.autograd.DeviceType

    def event(name: str, on: Any, microseconds: float, named: bool = False) -> Any:
        time_range = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=on, time_range=time_range, is_user_annotation=named)

    events = [
        *[event("nvjet", device_type.CUDA, 2000.0)] * profiles.REPLAYS * 2,
        *[event("flash", device_type.CUDA, 1000.0)] * profiles.REPLAYS,
        event("cudaGraphLaunch", device_type.CPU, 500.0),
        event("a range", device_type.CUDA, 9000.0, named=True),
    ]
    found = profiles.gpu_kernels(events)
    assert found == {"nvjet": (2.0, 4.0), "flash": (1.0, 1.0)}
    table = profiles.table(found)
    assert (table["ms"], table["kernels"]) == (5.0, 3.0)
    assert [(each["name"], each["share"]) for each in table["longest"]] == [("nvjet", 0.8), ("flash", 0.2)]
    assert table["classes"]["GEMM"] == {"ms": 4.0, "share": 0.8}


def test_the_profilers_own_events_have_what_is_read_of_them() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(3).sum()
    events: Any = profiler.events()
    assert profiles.gpu_kernels(events) == {}  # a CPU's
    assert all(each.time_range.elapsed_us() >= 0 and each.name for each in events)


def test_the_published_text_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sizes, and what the pipeline is given: without their weights."""
    monkeypatch.setattr(text_encoders, "fill_on", lambda device, dtype, module: module)
    given = Setting("sd3", CPU)
    encoders = text_encoders.TextEncoders(given)
    clips = [clip.num_parameters() for clip in encoders.clips]
    assert (clips, encoders.t5.num_parameters()) == ([123_650_304, 694_659_840], 4_762_310_656)
    assert text_encoders.random_vae(given).num_parameters() == 83_819_683
    assert [tokens.shape[1] for tokens in encoders.tokens(0)] == [77, 256]


def test_an_encoded_prompt_is_as_the_pipelines() -> None:
    encoders = text_encoders.TextEncoders(a_setting("sd3"))
    case = shared_case(a_setting("sd3"))
    prompt = encoders.encode(0)
    assert prompt.rows.shape == (1, *case.arguments["encoder_hidden_states"].shape[1:])
    assert prompt.pooled.shape == (1, *case.arguments["pooled_projections"].shape[1:])
    assert prompt.rows[0, : encoders.clip_length, 16:].abs().max() == 0  # CLIP's are padded to the width of T5's
    assert prompt.rows.isfinite().all()


@pytest.mark.parametrize("model", MODELS)
def test_the_loop_itself_leaves_the_host_alone(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance and diffusers' schedulers too, from the second step on; the schedule is the host's here."""
    monkeypatch.setattr("cat_pruning.finite._VALUELESS", frozenset())  # the meta device stands for a GPU
    case = Case(a_setting(model))
    case.transformer.to(DEAF)
    case.arguments = {name: tensor.to(DEAF) for name, tensor in case.arguments.items()}
    case.latents = case.latents.to(DEAF)
    transformer = CatTransformer.from_model(case.transformer, case.setting.prune)
    with contextlib.ExitStack() as stack:
        latents = case.sample(transformer, 12, lambda index: stack.enter_context(deaf()) if index == 1 else None)
        assert latents.device == DEAF
        assert transformer.last_step is not None
        assert transformer.last_step.kind.value == "pruned"
        with pytest.raises(HostTraffic):
            latents.copy_(torch.ones(()))


@pytest.mark.parametrize("model", [*MODELS, LARGE_MODEL])
def test_an_image_with_every_token_is_diffusers_own(model: str) -> None:
    """So what the case passes is what both take; of FLUX, guidance and positions."""
    case = shared_case(a_setting(model))
    full = case.setting.prune.replace(keep_ratio=1)
    ours = case.sample(CatTransformer(case.engine(), full), 10)
    assert torch.equal(ours, case.sample(case.transformer, 10))
    assert not torch.equal(ours, case.sample(CatTransformer(case.engine(), case.setting.prune), 10))
    assert case.sample(case.transformer, 10, stop_after=3).shape == case.latents.shape


def test_what_only_a_gpu_does_fits_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture, events and memory, by their signatures."""
    capture, event = create_autospec(cuda_graphs.capture), create_autospec(torch.cuda.Event)
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Event", event)
    event.return_value.elapsed_time.return_value = 8.0
    cuda, runs = torch.device("cuda"), []
    replay = timing.graph_of(lambda: runs.append(1), cuda)
    capture.call_args.args[0]()
    assert timing.timed(replay, cuda, repeats=4) == 2.0
    assert (len(runs), capture.return_value.replay.call_count) == (1, 4)


def test_the_memory_that_a_graph_reads_lives_as_long_as_its_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph keeps addresses, not tensors."""

    def capture(body: Callable[[], None], device: torch.device, others: Any) -> Any:
        body()
        return SimpleNamespace(replay=lambda: None)

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    read = torch.ones(3)
    seen = weakref.ref(read)
    replay = timing.graph_of(functools.partial(torch.neg, read), torch.device("cuda"))
    del read
    replay()
    assert seen() is not None
    del replay
    assert seen() is None


def test_the_peak_of_memory_is_over_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Callable[..., Any]] = {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 4_000_000_000,
        "memory_reserved": lambda device: 5_000_000_000,
        "max_memory_allocated": lambda device: 7_000_000_000,
        "max_memory_reserved": lambda device: 9_000_000_000,
    }
    for name, value in values.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    case = shared_case(a_setting("sd3"))
    made = []
    peak = memory._peak(case, lambda: made.append(1) or case.transformer)
    assert made == [1]
    assert peak == {"peak_gb": 7.0, "besides_gb": 3.0, "reserved_gb": 9.0, "reserved_besides_gb": 4.0}
