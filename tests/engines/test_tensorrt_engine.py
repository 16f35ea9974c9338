"""The TensorRT engine over a double of TensorRT that computes with ONNX Runtime at the addresses it was given."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorrt_double import TensorRTDouble

from cat_pruning.engines.plan import Plan
from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.engines.tensorrt_engine import TensorRTSession, TensorRTStepEngine
from cat_pruning.errors import EngineError, ShapeError
from cat_pruning.step_io import Part

CPU = torch.device("cpu")
SIZES = ((64, 64), (48, 80))  # of `make_tensorrt`
STEPS = 9  # three full ones, the first pruned one, five later ones
SCHEDULE = "F" * 3 + "P" * 6
Make = Callable[..., TensorRTStepEngine]


@pytest.fixture(params=["in place", "two cache sets"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def drop_in(drop_in: Any) -> Any:
    """The pipeline with three full steps."""
    return functools.partial(drop_in, full_steps=3)


@pytest.fixture
def sample(sample: Any) -> Any:
    """An image of the first size, unless another is asked for."""

    def run(pipe: Any, steps: int, size: tuple[int, int] = SIZES[0], **arguments: Any) -> Any:
        return sample(pipe, steps, size, **arguments)

    return run


@pytest.mark.long
def test_it_computes_what_onnx_runtime_does(
    kind: str, make_tensorrt: Make, engines: dict[str, StepEngine], drop_in: Any, sample: Any, library: TensorRTDouble
) -> None:
    """Two images of each of two sizes in turn, over the same contexts."""
    pipe = drop_in(make_tensorrt(kind))
    for size in (*SIZES, *SIZES):
        expected = sample(drop_in(engines["onnxruntime"]), STEPS, size)
        actual = sample(pipe, STEPS, size)
        assert actual.kinds == expected.kinds == SCHEDULE
        assert actual.same_tokens_as(expected)
        torch.testing.assert_close(actual.final, expected.final, rtol=0, atol=1e-5)
    # Per size and cache set a full and a pruned step; the small graphs' profiles depend on the text only: one for both.
    sets = 1 if kind == "in place" else 2
    assert len(library.contexts) == 2 * 2 * sets + 2


@pytest.mark.long
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_two_prompts(
    make_tensorrt: Make, engines: dict[str, StepEngine], drop_in: Any, sample: Any, guidance: float
) -> None:
    prompts = ["a small red ring on a plain black background", "a large blue star on a plain teal background"]
    count = (2,) if guidance > 1 else (1,)  # rows of a batch: without guidance two prompts are two
    arguments = {"prompt": prompts, "seed": [0, 1], "guidance_scale": guidance}
    expected = sample(drop_in(engines["onnxruntime"]), STEPS, **arguments)
    actual = sample(drop_in(make_tensorrt(prompts=count)), STEPS, **arguments)
    assert actual.same_tokens_as(expected)
    torch.testing.assert_close(actual.final, expected.final, rtol=0, atol=1e-5)


@pytest.mark.long
def test_what_is_bound_stays_bound(
    kind: str, make_tensorrt: Make, drop_in: Any, sample: Any, library: TensorRTDouble
) -> None:
    pipe = drop_in(make_tensorrt(kind))
    sample(pipe, STEPS)
    library.calls.clear()
    sample(pipe, STEPS)
    assert library.calls.count("execute_async_v3") == STEPS + 2
    assert library.calls.count("set_optimization_profile_async") == 0
    # The timesteps' results are new memory for every image; everything else is where it was.
    outputs = len(pipe.transformer.engine.plans[Part.TIMESTEP].outputs)
    inputs = len(pipe.transformer.engine.plans[Part.TIMESTEP].inputs)
    assert library.calls.count("set_tensor_address") <= outputs + inputs


def test_cache_sets(kind: str, make_tensorrt: Make) -> None:
    session = make_tensorrt(kind).session()
    assert isinstance(session, TensorRTSession)
    assert session.num_cache_sets == (1 if kind == "in place" else 2)


@pytest.mark.long
def test_a_failed_step_leaves_no_trace(
    kind: str, make_tensorrt: Make, drop_in: Any, sample: Any, library: TensorRTDouble
) -> None:
    """After an odd number of steps, so that the other cache set would be next."""
    pipe = drop_in(make_tensorrt(kind))
    expected = sample(pipe, STEPS)

    def fail(step: int) -> None:
        if step == 6:
            library.fail.add("execute_async_v3")

    with pytest.raises(EngineError, match=r"step\.plan: TensorRT.* failed in a step: CUDA error 700"):
        sample(pipe, STEPS, seed=1, on_step=fail)
    library.fail.clear()
    actual = sample(pipe, STEPS)
    assert torch.equal(actual.final, expected.final)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("create_execution_context", r"cannot make an execution context: .*out of memory.*smaller"),
        ("set_optimization_profile_async", r"refuses its profile 0"),
        ("set_input_shape", r"refuses the shape \(2, 48, 24\) of encoder_hidden_states"),
        ("set_tensor_address", r"refuses the address of encoder_hidden_states"),
    ],
)
def test_every_answer_is_checked(
    make_tensorrt: Make, drop_in: Any, sample: Any, library: TensorRTDouble, call: str, message: str
) -> None:
    pipe = drop_in(make_tensorrt())
    library.fail.add(call)
    with pytest.raises(EngineError, match=message):
        sample(pipe, STEPS)
    library.fail.clear()
    assert sample(pipe, STEPS).kinds == SCHEDULE


def test_shapes_that_no_profile_holds(make_tensorrt: Make, drop_in: Any, sample: Any) -> None:
    pipe = drop_in(make_tensorrt(sizes=((64, 64),)))
    with pytest.raises(ShapeError, match=r"step\.plan was built for .*--resolution.*run it: cat-export"):
        sample(pipe, STEPS, (48, 80))
    with pytest.raises(ShapeError, match=r"keep_indices has shape \(2, 32\).*built for \(2, 64\) or \(2, 19\)"):
        sample(drop_in(make_tensorrt(sizes=((64, 64),)), keep_ratio=0.5), STEPS)
    assert sample(pipe, STEPS).kinds == SCHEDULE


def test_a_plan_that_is_none(library: TensorRTDouble, tmp_path: Path) -> None:
    file = tmp_path / "step.plan"
    for content in (b"no plan", b""):
        file.write_bytes(content)
        with pytest.raises(EngineError, match=r"step\.plan: TensorRT 11\.4\.0 cannot load it"):
            Plan("tensorrt", file, CPU)


def test_a_plan_of_another_graph(make_tensorrt: Make) -> None:
    engine = make_tensorrt()
    plans = {**engine.plans, Part.STEP: engine.plans[Part.PROMPT]}
    with pytest.raises(EngineError, match=r"the plan of step\.onnx has other inputs or outputs than the graph"):
        TensorRTStepEngine(
            "tensorrt",
            plans,
            "plugin",
            list(engine.graphs.values()),
            family=engine.family,
            dtype=torch.float32,
            device=CPU,
            rebuild="cat-export …",
        )


def test_a_tensor_of_another_dtype(make_tensorrt: Make) -> None:
    engine = make_tensorrt()
    session = engine.session()
    plan = engine.plans[Part.PROMPT]
    scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8)
    context = plan.context(0, scratch, session._stream)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match=r"takes encoder_hidden_states as torch.float32, not torch.float16"):
        context.run({"encoder_hidden_states": torch.zeros(2, 48, 24, dtype=torch.float16)})


@pytest.mark.long
def test_a_device_that_is_out_of_memory(
    make_tensorrt: Make, drop_in: Any, sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = drop_in(make_tensorrt())
    expected = sample(pipe, STEPS)
    session = pipe.transformer._sampling().image.session

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr("cat_pruning.engines.tensorrt_engine.zeros", full)
        with pytest.raises(EngineError, match=r"not enough memory for an image of .*smaller or fewer images"):
            sample(pipe, STEPS, (48, 80))
    assert not session._caches  # nothing is held meanwhile
    assert session._noise.numel() == 0
    assert torch.equal(sample(pipe, STEPS).final, expected.final)


@pytest.mark.long
def test_two_threads(make_tensorrt: Make, drop_in: Any, sample: Any, engines: dict[str, StepEngine]) -> None:
    pipe = drop_in(make_tensorrt("two cache sets"))
    expected = [sample(pipe, STEPS, seed=seed) for seed in (0, 1)]
    actual: list[Any] = [None, None]
    encoded, at_once = threading.Event(), threading.Barrier(2)

    def run(seed: int) -> None:
        if seed == 1:  # the pipelines share a tokenizer, which is no two threads'
            assert encoded.wait(60)

        def meet(step: int) -> None:
            if step == 0:
                encoded.set()
                at_once.wait(60)

        actual[seed] = sample(drop_in(pipe.transformer.engine), STEPS, seed=seed, on_step=meet)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine.final, theirs.final)


@pytest.mark.long
def test_compiled_kernels_are_kept(make_tensorrt: Make, drop_in: Any, sample: Any, tmp_path: Path) -> None:
    """Once something ran, not when the process ends: a server is killed."""
    kernels = tmp_path / "bundle.cache" / "kernels"
    pipe = drop_in(make_tensorrt("two cache sets", kernels=kernels))
    assert not kernels.exists()
    sample(pipe, STEPS)
    assert kernels.read_bytes().endswith(b"kernels of this GPU")
    written = kernels.stat().st_mtime_ns
    sample(drop_in(make_tensorrt("two cache sets", kernels=kernels)), STEPS)
    assert kernels.stat().st_mtime_ns == written  # nothing new
    kernels.write_bytes(b"damaged")
    sample(drop_in(make_tensorrt("two cache sets", kernels=kernels)), STEPS)
    assert kernels.read_bytes().endswith(b"kernels of this GPU")


@pytest.mark.long
def test_another_keep_ratio_is_told_at_once(make_tensorrt: Make, drop_in: Any, sample: Any) -> None:
    """Not after the full steps, and what was there for the last image still is."""
    pipe = drop_in(make_tensorrt(), keep_ratio=0.3)
    expected = sample(pipe, STEPS)
    session = pipe.transformer._sampling().image.session
    steps: list[int] = []
    pipe.transformer.settings = pipe.transformer.settings.replace(keep_ratio=0.5)
    with pytest.raises(ShapeError, match=r"keep_indices has shape \(2, 32\)"):
        sample(pipe, STEPS, on_step=steps.append)
    assert steps == []
    assert session._noise.numel()
    pipe.transformer.settings = pipe.transformer.settings.replace(keep_ratio=0.3)
    assert torch.equal(sample(pipe, STEPS).final, expected.final)
