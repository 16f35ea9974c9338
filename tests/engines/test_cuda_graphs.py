"""Captured steps, over a double of CUDA graphs that replays on the memory of the capture and knows nothing else."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from graph_double import recorder
from tensorrt_double import TensorRTDouble

from cat_pruning.engines import cuda_graphs
from cat_pruning.engines.cuda_graphs import MOST_GRAPHS, CudaGraphs
from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.settings import Policy

CPU = torch.device("cpu")
# Four full ones, two for each cache set; the first pruned one, five later ones.
STEPS = 10
SIZES = ((64, 64), (48, 80))  # of `make_tensorrt`
ENGINES = ("torch", "tensorrt in place", "tensorrt two cache sets")

Make = Callable[..., StepEngine]


@pytest.fixture
def make(
    library: TensorRTDouble, make_tensorrt: Make, engines: dict[str, StepEngine], monkeypatch: pytest.MonkeyPatch
) -> Make:
    """Makes an engine whose sessions capture their steps, or the same one whose sessions don't."""

    def engine(name: str, captures: bool = True) -> StepEngine:
        graphs = functools.partial(CudaGraphs, recorder(library))
        monkeypatch.setattr("cat_pruning.engines.step_engine.CudaGraphs", graphs)
        if name == "torch":
            made = TorchStepEngine(engines["torch"].transformer)  # type: ignore[attr-defined]
            monkeypatch.setattr(TorchStepEngine, "cuda_graphs", captures)
            return made
        return make_tensorrt(name.removeprefix("tensorrt "), cuda_graphs=captures)

    return engine


@pytest.fixture
def drop_in(drop_in: Any) -> Any:
    """The pipeline with four full steps."""
    return functools.partial(drop_in, full_steps=4)


@pytest.fixture
def sample(sample: Any) -> Any:
    """An image of the first size, unless another is asked for."""

    def run(pipe: Any, steps: int = STEPS, size: tuple[int, int] = SIZES[0], **arguments: Any) -> Any:
        return sample(pipe, steps, size, **arguments)

    return run


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def captured(pipe: Any) -> int:
    graphs = pipe.transformer._sampling().image.session._graphs
    assert graphs._failures == 0
    return int(graphs.num_captured)


@pytest.mark.long
def test_replayed_images_are_the_images(name: str, make: Make, drop_in: Any, sample: Any) -> None:
    """Other prompts and seeds on the same memory; another size, whose memory is new, and back."""
    runs: list[dict[str, Any]] = [
        {"seed": 0},
        {"seed": 1, "prompt": "a small blue ring on a striped beige background"},
        {"seed": 2, "size": SIZES[1]},
        {"seed": 2, "size": SIZES[1]},
        {"seed": 3},
    ]
    plain = drop_in(make(name, captures=False))
    expected = [sample(plain, **run) for run in runs]
    assert captured(plain) == 0
    pipe = drop_in(make(name))
    kinds = 2 if name == "tensorrt two cache sets" else 1  # a graph for each cache set
    for run, image in zip(runs, expected, strict=True):
        actual = sample(pipe, **run)
        assert actual.same_tokens_as(image)
        assert torch.equal(actual.final, image.final)
        assert captured(pipe) >= 2 * kinds  # full steps, and pruned ones that choose their own tokens


@pytest.mark.long
def test_settings_change_between_images(name: str, make: Make, drop_in: Any, sample: Any) -> None:
    pipe, plain = drop_in(make(name)), drop_in(make(name, captures=False))
    changes: list[dict[str, Any]] = [
        {"fresh_fraction": 0.5},
        {"num_clusters": 9},
        {"refresh_every": 3},
        *({"policy": policy} for policy in Policy),
        {"refresh_every": 3, "reuse": "extrapolate"},
        {"fresh_fraction": 0.5},
    ]
    if name != "torch":  # policies are the selector's, whatever the engine
        changes = [change for change in changes if change.get("policy") in (None, Policy.NOISE)]
    for change in changes:
        images = []
        for each in (plain, pipe):
            make(name, captures=each is pipe)  # torch's is a switch of the class
            each.transformer.settings = each.transformer.settings.replace(
                **{
                    "fresh_fraction": 0.25,
                    "num_clusters": 20,
                    "refresh_every": 0,
                    "policy": "cat",
                    "reuse": "repeat",
                }
                | change
            )
            images.append(sample(each))
        assert images[0].same_tokens_as(images[1])
        assert torch.equal(images[0].final, images[1].final)


@pytest.mark.long
def test_a_second_order_scheduler(name: str, make: Make, drop_in: Any, sample: Any) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    expected = sample(drop_in(make(name, captures=False), scheduler=FlowMatchHeunDiscreteScheduler))
    pipe = drop_in(make(name), scheduler=FlowMatchHeunDiscreteScheduler)
    for _ in range(2):
        actual = sample(pipe)
        assert actual.same_tokens_as(expected)
        assert torch.equal(actual.final, expected.final)


@pytest.mark.long
def test_a_failure_in_the_middle(name: str, make: Make, drop_in: Any, sample: Any) -> None:
    expected = sample(drop_in(make(name, captures=False)))
    pipe = drop_in(make(name))

    def interrupt(step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    sample(pipe)
    with pytest.raises(KeyboardInterrupt):
        sample(pipe, seed=1, on_step=interrupt)
    assert torch.equal(sample(pipe).final, expected.final)


def test_what_cannot_be_captured_runs_as_it_is(
    make: Make, drop_in: Any, sample: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = sample(drop_in(make("torch", captures=False)))
    pipe = drop_in(make("torch"))
    from cat_pruning.runtime.selection import selection

    original = selection.next_selection

    def reads_on_the_host(noise: Any, *arguments: Any) -> Any:
        assert noise.sum().item() is not None
        return original(noise, *arguments)

    monkeypatch.setattr(selection, "next_selection", reads_on_the_host)
    for _ in range(2):
        assert torch.equal(sample(pipe).final, expected.final)
    warnings = [record for record in caplog.records if "cannot be captured" in record.message]
    assert len(warnings) == 1
    assert "not permitted when stream is capturing" in warnings[0].message


@pytest.mark.long
def test_adapters_between_images(make: Make, drop_in: Any, sample: Any) -> None:
    """Loaded, scaled, switched off and unloaded: a captured step is of the module as it was."""
    import peft

    engine = make("torch")
    assert isinstance(engine, TorchStepEngine)
    transformer = engine.transformer
    pipe = drop_in(engine)
    plain = sample(pipe).final
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    transformer.add_adapter(config)
    try:
        styled = sample(pipe).final
        assert not torch.allclose(styled, plain, atol=1e-3)
        for layer in transformer.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.set_scale("default", 0.5)
        half = sample(pipe).final
        assert not torch.allclose(half, styled, atol=1e-3)
        transformer.disable_adapters()
        torch.testing.assert_close(sample(pipe).final, plain, rtol=0, atol=1e-5)
        transformer.enable_adapters()
        assert torch.equal(sample(pipe).final, half)
    finally:
        transformer.delete_adapters("default")
    torch.testing.assert_close(sample(pipe).final, plain, rtol=0, atol=1e-5)


def test_the_first_run_is_an_ordinary_one_and_the_oldest_graph_goes() -> None:
    calls: list[str] = []

    class Graph:
        def __init__(self, body: Callable[[], None]) -> None:
            calls.append("capture")

        def replay(self) -> None:
            calls.append("replay")

    graphs = CudaGraphs(lambda body, device, others: Graph(body))
    for _ in range(3):
        graphs.run("key", lambda: calls.append("body"), CPU)
    assert calls == ["body", "capture", "replay", "replay"]
    calls.clear()
    for key in range(MOST_GRAPHS):
        graphs.run(key, lambda: calls.append("body"), CPU)
    graphs.run("key", lambda: calls.append("body"), CPU)  # was the oldest
    assert calls == ["body"] * (MOST_GRAPHS + 1)
    graphs.clear()
    assert graphs.num_captured == 0


def test_a_failed_capture_is_tried_once_more() -> None:
    """Another thread may have done what breaks a capture; new memory is a new chance."""
    tried: list[str] = []

    def fails(*arguments: Any) -> Any:
        tried.append("capture")
        raise RuntimeError("operation failed due to a previous error during capture")

    graphs = CudaGraphs(fails)
    for _ in range(4):
        graphs.run("key", lambda: tried.append("body"), CPU)
    assert tried == ["body", "capture", "body", "capture", "body", "body"]
    graphs.clear()
    tried.clear()
    for _ in range(2):
        graphs.run("key", lambda: tried.append("body"), CPU)
    assert tried == ["body", "capture", "body"]


class Graph:
    def replay(self) -> None:
        pass


def test_memory_of_a_failed_capture_is_not_shared_again() -> None:
    """Torch does not end a failed capture's use of the memory that it shared: another one there would fail."""
    shared: list[int] = []
    failures = iter([False, True, False, False])

    def capture(body: Callable[[], None], device: torch.device, others: Sequence[Any]) -> Graph:
        shared.append(len(others))
        if next(failures):
            raise RuntimeError("operation failed due to a previous error during capture")
        return Graph()

    graphs = CudaGraphs(capture)
    for key in ("one", "one", "two", "two", "two", "three", "three"):
        graphs.run(key, lambda: None, CPU)
    assert shared == [0, 1, 0, 1]
    assert graphs.num_captured == 3


def test_nothing_is_launched_amid_a_capture() -> None:
    """Sessions of other threads wait for it."""
    captures, launched = threading.Event(), []

    def capture(body: Callable[[], None], *arguments: Any) -> Graph:
        captures.set()
        other.join(timeout=0.2)
        launched.append("captured")
        return Graph()

    def launch() -> None:
        captures.wait(10)
        CudaGraphs(capture).run("key", lambda: launched.append("launched"), CPU)

    other = threading.Thread(target=launch)
    other.start()
    graphs = CudaGraphs(capture)
    for _ in range(2):
        graphs.run("key", lambda: None, CPU)
    other.join()
    assert launched == ["captured", "launched"]


def test_what_was_captured_is_replayed_whatever_fails_later() -> None:
    ran: list[str] = []

    class Graph:
        def replay(self) -> None:
            ran.append("replay")

    def capture(body: Callable[[], None], *arguments: Any) -> Graph:
        if ran[-1] == "bad":
            raise RuntimeError("operation not permitted when stream is capturing")
        return Graph()

    graphs = CudaGraphs(capture)
    for _ in range(2):
        graphs.run("good", lambda: ran.append("good"), CPU)
    for _ in range(4):
        graphs.run("bad", lambda: ran.append("bad"), CPU)
    graphs.run("good", lambda: ran.append("good"), CPU)
    assert ran == ["good", "replay", *["bad"] * 4, "replay"]


class FakeCuda:
    """Torch's own captures, as far as `capture` sees them: its graph leaves its stream behind when its end fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
        self.current = "the caller's"
        self.passed: dict[str, Any] = {}
        cuda = self

        class Graph:
            def __init__(self, graph: Any, **options: Any) -> None:
                cuda.passed = options

            def __enter__(self) -> None:
                cuda.current = cuda.passed["stream"]

            def __exit__(self, *error: Any) -> None:
                if fails:
                    raise RuntimeError("capture_end")
                cuda.current = "the caller's"

        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "a graph")
        monkeypatch.setattr(torch.cuda, "graph", Graph)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: f"{device} {priority}")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream))
        self.cleared_on: list[str] = []
        clear = "_cuda_clearCublasWorkspaces"
        monkeypatch.setattr(torch._C, clear, lambda: self.cleared_on.append(self.current), raising=False)


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_stream_is_current_again(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    cuda = FakeCuda(monkeypatch, fails)
    device = torch.device("cuda", 1)
    seen: list[tuple[Any, bool]] = []
    cuda_graphs._stream.cache_clear()
    try:
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            cuda_graphs.capture(lambda: seen.append((cuda.current, gc.isenabled())), device, [])
    finally:
        cuda_graphs._stream.cache_clear()
    assert seen == [("cuda:1 -1", False)]  # a stream of that device, which no other work is on
    assert cuda.cleared_on == ["cuda:1 -1"]  # amid the capture: cuBLAS' workspace is of this graph alone
    assert cuda.current == "the caller's"
    assert gc.isenabled()
