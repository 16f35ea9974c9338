"""The GPU's benchmarks at sizes for a CPU: every measurement runs to its end; the bounds are the committed MACs'."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any
from unittest.mock import create_autospec

import bench_gpu
import pytest
import torch
from bench_gpu import MODELS, Case, Setting
from deaf_device import DEAF, HostTraffic, deaf

from cat_pruning.runtime import cuda_graphs
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings

# Of diffusers' schedulers, of the pair of torch and numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--tiny", "--rounds", "1", "--steps", "10"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of every measurement but those that need a GPU or its compiler."""
    out = tmp_path_factory.mktemp("results") / "bench.json"
    names = [name for name in bench_gpu.MEASUREMENTS if name not in ("kernels", "compile", "autotune")]
    assert bench_gpu.main([*names, *TINY, "--out", str(out)]) == 0
    content: dict[str, Any] = json.loads(out.read_text())
    assert list(content) == names
    return content


def test_steps(results: dict[str, Any]) -> None:
    for model in MODELS:
        for captured in ("with CUDA graphs", "without CUDA graphs"):
            steps = results["steps"][model][captured]
            assert set(steps["ms"]) == {"full", "pruned", "selection"}
            assert steps["of_bound"] == pytest.approx(steps["speedup"] / steps["mac_bound"])
        assert set(results["steps"][model]["attention"]) == {"full", "pruned"}
        assert not results["steps"][model]["attention"]["full"].isdigit()


def test_loops_and_peers(results: dict[str, Any]) -> None:
    for model in MODELS:
        loop = results["loops"][model]["10 steps, with CUDA graphs"]
        assert set(loop["ms"]) == {"full", "CAT"}
        assert results["diffusers"][model]["diffusers"]["over_ours"]["full"] > 0
        assert results["synchronisations"][model]["with CUDA graphs"] == "none in steps 2 to 10"
    assert results["matmul"]["bf16_tflops"] > 0
    assert set(results["selection"]["ms"]) == {"selection", "kmeans"}


def test_every_number_is_one(results: dict[str, Any]) -> None:
    def numbers(value: Any) -> Iterator[float]:
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from numbers(each)
        if isinstance(value, float):
            yield value

    assert all(math.isfinite(number) and number >= 0 for number in numbers(results))


def test_what_is_compiled_is_diffusers_module(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def compiled(module: Any, mode: str, dynamic: bool) -> Any:
        assert type(module).__module__.startswith("diffusers")
        modes.append(mode)
        return module

    monkeypatch.setattr(torch, "compile", compiled)
    for name in ("compile", "autotune"):
        assert dict(bench_gpu.MEASUREMENTS[name](setting("sd3")))
    assert modes == ["default", "max-autotune-no-cudagraphs"]


def setting(model: str) -> Setting:
    return Setting(model, CPU, tiny=True, rounds=1, steps=(10,), prune=PruneSettings(num_clusters=5))


def test_the_bounds_are_the_macs() -> None:
    settings = PruneSettings()
    assert bench_gpu.loop_bound("sd3", 28, settings) == pytest.approx(1.864, abs=1e-3)
    assert bench_gpu.loop_bound("sd3", 50, settings) == pytest.approx(2.198, abs=1e-3)
    assert bench_gpu.loop_bound("sd3", 28, settings.replace(full_steps=28)) == pytest.approx(1, abs=2e-3)
    assert bench_gpu.step_bound("pixart-sigma") == pytest.approx(3.28, abs=1e-2)


def test_published_sizes_where_nothing_is_tiny() -> None:
    for model in MODELS:
        assert Setting(model, CPU).num_tokens == 4096


@pytest.mark.parametrize("model", MODELS)
def test_the_loop_itself_leaves_the_host_alone(model: str) -> None:
    """Guidance and diffusers' schedulers too, from the second step on; the schedule is the host's here."""
    case = Case(setting(model))
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


def test_what_only_a_gpu_does_fits_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture and events, by their signatures."""
    capture, event = create_autospec(cuda_graphs.capture), create_autospec(torch.cuda.Event)
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Event", event)
    event.return_value.elapsed_time.return_value = 8.0
    cuda, runs = torch.device("cuda"), []
    replay = bench_gpu.graph_of(lambda: runs.append(1), cuda)
    capture.call_args.args[0]()
    assert replay is capture.return_value.replay
    assert bench_gpu.timed(replay, cuda, repeats=4) == 2.0
    assert (len(runs), replay.call_count) == (1, 4)
