"""The torch engine on a GPU: captured steps, the CPU's results, and a loop that never waits. On the CPU, the tests."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from cat_pruning.engines import torch_engine
from cat_pruning.engines.torch_compiled import LinearGelu
from cat_pruning.engines.torch_engine import TorchSession, TorchStepEngine
from cat_pruning.errors import EngineError
from cat_pruning.runtime.selection import kmeans, selection
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import Pooling, PruneSettings

Make = Callable[..., CatTransformer]


def captured(transformer: CatTransformer) -> int:
    graphs = transformer._sampling().image.session._graphs
    assert graphs._failures == 0
    return graphs.num_captured


@pytest.mark.long
def test_captured_steps_equal_uncaptured_ones(
    device: torch.device, make: Make, sample: Any, assert_same_image: Any
) -> None:
    """Other prompts and seeds on the same memory; another size, whose memory is new, and back."""
    runs: list[dict[str, Any]] = [{"seed": 0}, {"seed": 1}, {"seed": 2, "size": (12, 20)}, {"seed": 3}]
    plain, fast = make(device, captures=False), make(device)
    for run in runs:
        assert_same_image(sample(fast, **run), sample(plain, **run), exact=device.type == "cpu")
        assert captured(plain) == 0
        assert captured(fast) >= 2  # full steps, and pruned ones that choose their own tokens


@pytest.mark.long
def test_settings_between_images(device: torch.device, make: Make, sample: Any, assert_same_image: Any) -> None:
    plain, fast = make(device, captures=False), make(device)
    for settings in (
        PruneSettings(full_steps=4),
        PruneSettings(keep_ratio=0.5, num_clusters=9),
        PruneSettings(refresh_every=5, pooling=Pooling.MEAN),
        PruneSettings(keep_ratio=1),
    ):
        plain.settings = fast.settings = settings
        assert_same_image(sample(fast), sample(plain), exact=device.type == "cpu")


@pytest.mark.long
def test_a_control_nets_residuals(device: torch.device, make: Make, sample: Any, assert_same_image: Any) -> None:
    """Other ones on every step, in other numbers and none at all, which are captured apart."""

    def residuals(step: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        made = [torch.randn(2, 64, 192, generator=generator).to(device) for _ in range(step % 3)]
        return {"block_controlnet_hidden_states": made}

    settings = {"full_steps": 4, "num_clusters": 9}
    plain, fast = make(device, captures=False, **settings), make(device, **settings)
    for seed in (0, 1):
        expected = sample(plain, seed, arguments_of=residuals)
        assert_same_image(sample(fast, seed, arguments_of=residuals), expected, exact=device.type == "cpu")
    different = 1 + min(2, fast.engine.family.num_residuals)  # none, one, and two where there are as many layers
    assert captured(fast) == 2 * different + 1  # full steps and pruned ones with each; the first pruned one
    assert not torch.allclose(sample(plain, 1).latents, expected.latents, atol=1e-2)


@pytest.mark.long
def test_adapters_between_images(device: torch.device, make: Make, sample: Any, assert_same_image: Any) -> None:
    peft = pytest.importorskip("peft")
    plain, fast = make(device, captures=False), make(device)
    without = sample(fast)
    module: Any = fast.engine.transformer  # type: ignore[attr-defined]
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    module.add_adapter(config)
    try:
        styled = sample(fast)
        assert not torch.allclose(styled.latents, without.latents, atol=1e-2)
        assert_same_image(styled, sample(plain), exact=device.type == "cpu")
    finally:
        module.delete_adapters("default")
    assert_same_image(sample(fast), without)


@pytest.mark.long
def test_the_results_of_the_cpu(device: torch.device, make: Make, sample: Any, assert_same_image: Any) -> None:
    cpu = make(torch.device("cpu"), captures=False)
    expected = [sample(cpu, seed) for seed in range(3)]
    for captures in (False, True):
        for seed in range(3):
            assert_same_image(sample(make(device, captures), seed), expected[seed], exact=device.type == "cpu")


@pytest.mark.parametrize("pooling", Pooling)
def test_the_same_noise_selects_the_same_tokens(device: torch.device, pooling: Pooling) -> None:
    """At SD3-medium's size: clusters and two selections, each from what the CPU found."""
    settings, grid, channels = PruneSettings(pooling=pooling), (64, 64), 64
    noise = torch.randn(2, 4096, channels, generator=torch.Generator().manual_seed(0))
    features = selection.cluster_features(noise, kmeans.position_encoding(*grid, channels), 1.0)
    initial = kmeans.initial_tokens(*grid, settings.num_clusters)
    clusters = kmeans.kmeans(features, initial, settings.kmeans_iterations)
    here = kmeans.kmeans(features.to(device), initial.to(device), settings.kmeans_iterations)
    assert (here.cpu() != clusters).float().mean() < 1e-3
    count = torch.rand(2, 4096, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    for select, given in (
        (selection.first_selection, (noise, clusters)),
        (selection.next_selection, (noise, clusters, count)),
    ):
        expected = select(*given, 1228, settings)  # type: ignore[arg-type]
        actual = select(*(tensor.to(device) for tensor in given), 1228, settings).cpu()  # type: ignore[arg-type]
        assert sum(len(set(a.tolist()) ^ set(b.tolist())) for a, b in zip(actual, expected, strict=True)) <= 4


@pytest.mark.long
@pytest.mark.parametrize("captures", [True, False])
def test_a_loop_never_waits_for_the_device(device: torch.device, captures: bool, make: Make, sample: Any) -> None:
    """From the second step on. Not in a session's first two images, which capture its steps, and that waits."""
    transformer, is_cuda = make(device, captures), device.type == "cuda"

    def forbid(step: int) -> None:
        if is_cuda and step == 1:
            torch.cuda.set_sync_debug_mode("error")

    for seed in range(2):
        sample(transformer, seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        try:
            sample(transformer, seed=2, on_step=forbid)
        finally:
            if is_cuda:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.long
@pytest.mark.parametrize("captures", [True, False])
def test_compiled_steps(
    device: torch.device,
    captures: bool,
    make: Make,
    sample: Any,
    assert_same_image: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two images of a size, and one of another, with kernels that torch makes.

    On the CPU it makes none, and follows no graph: tests/engines/test_torch_compiled.py has it follow them.
    """
    if device.type == "cpu":
        monkeypatch.setattr(torch_engine, "compile_blocks", lambda transformer: None)
    plain, fast = make(device, captures=False), make(device, captures, compiled=True)
    for run in ({"seed": 0}, {"seed": 1}, {"seed": 2, "size": (12, 20)}):
        assert_same_image(sample(fast, **run), sample(plain, **run))
    assert (captured(fast) >= 2) == captures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device here")
@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
def test_float8(granularity: str, miniature: Any, sample: Any, assert_same_image: Any) -> None:
    """Products of float8 by torchao: compiled and captured, near bf16's, and those of the module itself."""
    quantization = pytest.importorskip("torchao.quantization")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no products of float8")
    exact = copy.deepcopy(miniature("cuda")).bfloat16()
    module = copy.deepcopy(exact)
    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=getattr(quantization, granularity)(), set_inductor_config=False
    )
    quantization.quantize_(module, config, filter_fn=lambda layer, name: is_linear(layer) and ".ff." in name)
    plain, fast = (
        CatTransformer(TorchStepEngine(module, cuda_graphs=compiled, compiled=compiled)) for compiled in (False, True)
    )
    reference = CatTransformer(TorchStepEngine(exact, cuda_graphs=False))
    for seed in range(2):
        image = sample(fast, seed)
        assert_same_image(image, sample(plain, seed), rounding=5e-2)
        error = (image.latents - sample(reference, seed).latents).norm() / image.latents.norm()
        assert 0 < error < 0.3
    assert captured(fast) >= 2


def is_linear(layer: torch.nn.Module) -> bool:
    return isinstance(layer, torch.nn.Linear)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_in_a_matrix_product(dtype: torch.dtype) -> None:
    """What cuBLAS computes is the GELU by tanh: a private operator of torch, whose CPU kernel computes another."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(1536, 6144, device="cuda", dtype=dtype)
    rows = torch.randn(2, 333, 1536, device="cuda", dtype=dtype)
    with torch.no_grad():
        expected = torch.nn.functional.gelu(linear(rows), approximate="tanh")
        actual = LinearGelu(linear)(rows)
    error = (actual.float() - expected.float()).abs().max()
    assert error < (1e-5 if dtype is torch.float32 else 2e-2)


def test_an_image_that_does_not_fit(
    device: torch.device, make: Make, sample: Any, assert_same_image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = make(device)
    expected = sample(transformer)
    engine, session = transformer.engine, transformer._sampling().image.session
    dims = engine.family.dims((16, 16), batch=2**20, text_length=48, num_kept=0)
    shapes = engine.family.input_shapes(dims)
    nothing = torch.zeros(())
    inputs = {name: nothing.expand([int(size) for size in shape]) for name, shape in shapes.items()}
    with monkeypatch.context() as patch:
        if device.type == "cpu":
            patch.setattr("cat_pruning.engines.step_engine.zeros", _full)
        with pytest.raises(EngineError, match="not enough memory"):
            session.begin(dims, inputs)
    assert_same_image(sample(transformer), expected, exact=device.type == "cpu")


def test_a_step_that_does_not_fit(
    device: torch.device, make: Make, sample: Any, assert_same_image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caches do, and what it computes between them does not."""
    transformer = make(device)
    expected = sample(transformer)
    session = transformer._sampling().image.session
    original = TorchSession._run

    def run(session: TorchSession, keep_indices: torch.Tensor) -> None:
        if device.type == "cuda":
            torch.empty(torch.cuda.mem_get_info(device)[1], dtype=torch.float32, device=device)  # four times the card
        _full()

    with monkeypatch.context() as patch:
        patch.setattr(TorchSession, "_run", run)
        with pytest.raises(EngineError, match="not enough memory for an image of 12x20 latents and 2 rows"):
            sample(transformer, size=(12, 20))
    assert TorchSession._run is original
    assert not session._caches
    assert_same_image(sample(transformer), expected, exact=device.type == "cpu")


def _full(*arguments: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB.")


@pytest.mark.long
def test_memory_does_not_grow(device: torch.device, make: Make, sample: Any) -> None:
    """Over twenty images, after three that allocate and capture; on the CPU over eight."""
    transformer = make(device)
    images = 23 if device.type == "cuda" else 11
    sizes = {}
    for seed in range(images):
        sample(transformer, seed, steps=10)
        if seed in (2, 3, 6, images - 1):  # the CPU's tensors are looked for among all objects of the process
            sizes[seed] = held_bytes(device)
    assert max(sizes.values()) <= sizes[2]


def held_bytes(device: torch.device) -> int:
    """Memory of the tensors that are alive on the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [each for each in tensors if each.device == device]
    return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device here")
def test_threads_with_streams_of_their_own(make: Make, sample: Any, assert_same_image: Any) -> None:
    """One session goes from stream to stream: its next image waits for the last one's work, and its memory too."""
    device = torch.device("cuda")
    transformer = make(device)
    expected = [sample(make(device), seed=seed, size=size) for seed, size in ((1, (16, 16)), (2, (12, 20)))]

    def generate(number: int) -> Any:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            seed, size = ((1, (16, 16)), (2, (12, 20)))[number % 2]
            sampled = sample(transformer, seed=seed, size=size)
            torch.cuda.current_stream().synchronize()  # it is read on another stream
            return sampled

    for number in range(6):
        with ThreadPoolExecutor(1) as pool:  # a new thread, and a new stream
            assert_same_image(pool.submit(generate, number).result(), expected[number % 2], exact=False)
    assert transformer.sessions.num_sessions == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device here")
def test_threads_at_once(make: Make, sample: Any, assert_same_image: Any) -> None:
    """Two sessions whose steps one thread captured are replayed at once: they share no memory, cuBLAS' neither."""
    device = torch.device("cuda")
    transformer = make(device)
    expected = [sample(make(device), seed=seed) for seed in (1, 2)]

    def generate(seed: int) -> Any:
        sampled = sample(transformer, seed=seed)
        torch.cuda.current_stream().synchronize()  # it is read on another stream
        return sampled

    def begin() -> None:
        torch.cuda.set_stream(torch.cuda.Stream(device))

    with ThreadPoolExecutor(2, initializer=begin) as pool:
        for _ in range(5):
            together = list(pool.map(generate, (1, 2)))
            for mine, alone in zip(together, expected, strict=True):
                assert_same_image(mine, alone, exact=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device here")
def test_conditioning_made_anew_is_compared_without_a_wait(make: Make) -> None:
    """Alike: one image. Another prompt from the sixth step on: seen one call later."""
    device = torch.device("cuda")
    transformer = make(device)
    config = transformer.engine.family.config
    text = torch.zeros(1, 48, config["joint_attention_dim"], device=device)
    pooled = torch.zeros(1, config["pooled_projection_dim"], device=device)
    timesteps = torch.linspace(1000, 100, 12, device=device)
    numbers: list[int] = []
    for step, timestep in enumerate(timesteps):
        latents = torch.randn(1, 4, 16, 16, device=device)
        changed = pooled.clone() + (step > 5)
        with torch.no_grad():
            transformer(latents, timestep=timestep.expand(1), encoder_hidden_states=text, pooled_projections=changed)
        torch.cuda.synchronize()
        assert transformer.last_step is not None
        numbers.append(transformer.last_step.step)
    assert numbers == [*range(7), *range(5)]
