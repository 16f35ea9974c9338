"""What `cat-doctor` finds on doubles of machines with a GPU, and where libraries are broken."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import onnxruntime
import pytest
import torch
from doctor_findings import by_topic, changed, statuses

from cat_pruning.bundle.schema import PlanSpec
from cat_pruning.engines import gpu
from cat_pruning.errors import EngineError
from cat_pruning.names import Flavour
from cat_pruning.plugins import cuda_kernels, cuda_launch
from cat_pruning.step_io import Part
from cat_pruning.tools.doctor import examine
from cat_pruning.tools.findings import Finding, isolated


class FakeTensorRT(ModuleType):
    """As far as it is asked to start; `refuses` as the bindings do, after a line in the log."""

    def __init__(self, name: str, version: str, *, refuses: bool = False) -> None:
        super().__init__(name)
        self.__version__, self.__spec__ = version, ModuleSpec(name, None)

        class ILogger:
            Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

            def log(self, severity: int, message: str) -> None: ...

        def make(logger: Any) -> object:
            if refuses:
                logger.log(1, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            return object()

        self.ILogger, self.Builder, self.Runtime = ILogger, make, make


MakeGpu = Callable[..., None]


@pytest.fixture
def make_gpu(monkeypatch: pytest.MonkeyPatch) -> MakeGpu:
    """Makes this a machine with a GPU: its architecture, and the versions of TensorRT and TensorRT-RTX."""

    def make(architecture: str = "sm89", *libraries: FakeTensorRT) -> None:
        properties = SimpleNamespace(name="NVIDIA L4", total_memory=24 << 30)
        capability = divmod(int(architecture.removeprefix("sm")), 10)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(gpu, "driver_version", lambda: "580.65.06")
        monkeypatch.setattr(gpu, "driver_cuda_version", lambda: "13.0")
        monkeypatch.setattr(cuda_launch, "plugin_self_test", lambda device: None)
        for name in get_args(Flavour):
            monkeypatch.setitem(sys.modules, name, None)
        for library in libraries:
            monkeypatch.setitem(sys.modules, library.__name__, library)

    return make


def plans(flavour: Flavour, version: str, *architectures: str) -> tuple[PlanSpec, ...]:
    """Specs over files that the bundle has; none of them is loaded."""
    return tuple(
        PlanSpec(
            part=part,
            flavour=flavour,
            version=version,
            architectures=architectures,
            token_ops="function",
            file=part.onnx,
        )
        for part in Part
    )


RTX_ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")
TENSORRT = FakeTensorRT("tensorrt", "11.4")
RTX = FakeTensorRT("tensorrt_rtx", "1.7")


def test_a_gpu_and_everything_installed(make_gpu: MakeGpu) -> None:
    make_gpu("sm89", TENSORRT, RTX)
    report = examine()
    machine = by_topic(report.machine)
    assert machine["gpu"].text == "NVIDIA L4, 24 GiB, sm89"
    assert machine["driver"].text == "580.65.06, runs CUDA 13.0 and older"
    assert machine["torch"].text == f"{torch.__version__}, built with CUDA 13.0"
    assert machine["plugin"].text.endswith("on this GPU compute what torch does")
    assert report.gpu == {
        "name": "NVIDIA L4",
        "memory_bytes": 24 << 30,
        "architecture": "sm89",
        "driver_version": "580.65.06",
        "driver_cuda_version": "13.0",
        "torch_cuda_version": "13.0",
    }
    engines = by_topic(report.engines)
    assert engines["tensorrt"].text == "on the GPU, from plans of version 11.4 for sm89"
    assert engines["torch"].text == "on the GPU"
    assert engines["auto"].text == ("takes tensorrt or tensorrt_rtx where a bundle has plans for it, else onnxruntime")
    assert statuses(report.targets) == {"onnx": "ok", "tensorrt": "ok", "tensorrt_rtx": "ok"}
    assert by_topic(report.targets)["tensorrt"].text == "TensorRT 11.4 plans for sm89"
    assert (report.can_generate, report.engine) == (True, "tensorrt")


def test_onnxruntime_without_its_cuda_provider(make_gpu: MakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    make_gpu()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    report = examine()
    for finding in (by_topic(report.machine)["onnxruntime"], by_topic(report.engines)["onnxruntime"]):
        assert finding.status == "warning"
        assert "this build has no CUDA provider" in finding.text
        assert finding.remedy == "pip uninstall onnxruntime, then pip install onnxruntime-gpu"


@pytest.mark.parametrize("loads", [True, False])
def test_a_cuda_provider_is_tried(make_gpu: MakeGpu, monkeypatch: pytest.MonkeyPatch, loads: bool) -> None:
    make_gpu()
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    real = onnxruntime.InferenceSession

    def session(graph: bytes, options: Any, providers: list[str]) -> Any:
        real(graph, options, providers=["CPUExecutionProvider"])  # a graph that ONNX Runtime takes
        return SimpleNamespace(get_providers=lambda: names if loads else names[1:])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    engine = by_topic(examine().engines)["onnxruntime"]
    if loads:
        assert engine == Finding("onnxruntime", "ok", "on the GPU")
    else:
        assert (engine.status, engine.text) == ("problem", "its CUDA provider cannot be loaded")
        assert engine.remedy == "pip install 'onnxruntime-gpu[cuda,cudnn]'"


def test_hopper_is_no_gpu_of_tensorrt_rtx(make_gpu: MakeGpu) -> None:
    make_gpu("sm90", RTX)
    report = examine()
    engine = by_topic(report.engines)["tensorrt_rtx"]
    assert (engine.status, engine.text) == (
        "problem",
        "TensorRT-RTX builds no plans for sm90, this machine's GPU",
    )
    assert report.engine == "onnxruntime"
    assert by_topic(report.targets)["tensorrt_rtx"].status == "ok"  # for other machines


def test_plans_that_fit(make_gpu: MakeGpu, mini_bundle: Path) -> None:
    make_gpu("sm89", TENSORRT, RTX)
    report = examine(
        changed(
            mini_bundle, plans=(*plans("tensorrt", "11.4", "sm89"), *plans("tensorrt_rtx", "1.7", *RTX_ARCHITECTURES))
        )
    )
    topics = ("pipeline", "schedules", "plans tensorrt", "plans tensorrt_rtx")
    assert statuses(report.bundle) == dict.fromkeys(topics, "ok")
    assert by_topic(report.engines)["auto"].text == "takes tensorrt"
    assert report.engine == "tensorrt"


@pytest.mark.parametrize(
    ("architecture", "built", "problem", "rebuild"),
    [
        ("sm89", plans("tensorrt_rtx", "1.7", *RTX_ARCHITECTURES), "no plans for TensorRT", "tensorrt"),
        ("sm89", plans("tensorrt", "10.15", "sm89"), "no plans for TensorRT 11.4, and plans of one", "tensorrt"),
        ("sm89", plans("tensorrt", "11.4", "sm90"), "no plans for sm89, this machine's GPU", "tensorrt"),
        ("sm89", plans("tensorrt_rtx", "1.6", *RTX_ARCHITECTURES), "no plans for TensorRT-RTX 1.7", "tensorrt_rtx"),
        ("sm90", plans("tensorrt_rtx", "1.7", *RTX_ARCHITECTURES), "no plans for sm90, this machine's GPU", "tensorrt"),
    ],
)  # fmt: skip
def test_plans_that_do_not_fit(
    make_gpu: MakeGpu,
    mini_bundle: Path,
    architecture: str,
    built: tuple[PlanSpec, ...],
    problem: str,
    rebuild: Flavour,
) -> None:
    make_gpu(architecture, TENSORRT, RTX)
    bundle = changed(mini_bundle, plans=built)
    report = examine(bundle)
    flavour = "tensorrt" if "TensorRT-RTX" not in problem and architecture == "sm89" else "tensorrt_rtx"
    for finding in (by_topic(report.bundle)[f"plans {flavour}"], by_topic(report.engines)[flavour]):
        assert problem in finding.text
        assert finding.remedy == bundle.add_plans_command(rebuild)
    assert statuses(report.bundle)[f"plans {flavour}"] == "warning"
    assert statuses(report.engines)[flavour] == "problem"
    assert report.can_generate


def test_plans_of_a_library_that_is_not_installed(make_gpu: MakeGpu, mini_bundle: Path) -> None:
    make_gpu("sm89")
    report = examine(changed(mini_bundle, plans=plans("tensorrt", "11.4", "sm89")))
    finding = by_topic(report.bundle)["plans tensorrt"]
    assert (finding.status, finding.remedy) == ("warning", "pip install 'cat-pruning[tensorrt]'")
    assert finding.text == "of version 11.4 for sm89; TensorRT does not run here"


@pytest.mark.parametrize(
    ("driver", "built", "status", "remedy"),
    [
        (None, None, "warning", "if there is an NVIDIA GPU: install NVIDIA's driver and a torch built with CUDA"),
        (None, "13.0", "warning", "if there is an NVIDIA GPU: install NVIDIA's driver"),
        ("12.8", None, "problem", "install a torch built with CUDA 12.8 or older"),
        ("9.2", "13.0", "problem",
         "update NVIDIA's driver to one of CUDA 13.0, or install a torch built with CUDA 9.2 or older"),
        ("13.0", "13.0", "problem", "look at nvidia-smi, and at CUDA_VISIBLE_DEVICES if it is set"),
    ],
)  # fmt: skip
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, built: str | None, status: str, remedy: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(gpu, "driver_cuda_version", lambda: driver)
    monkeypatch.setattr(gpu, "missing_gpu", lambda: "in torch's words")
    finding = by_topic(examine().machine)["gpu"]
    assert finding == Finding("gpu", status, "none that torch can use (in torch's words)", remedy)  # type: ignore[arg-type]


# Broken libraries


def test_a_tensorrt_that_does_not_start(make_gpu: MakeGpu) -> None:
    make_gpu("sm89", FakeTensorRT("tensorrt", "11.4", refuses=True))
    report = examine()
    machine = by_topic(report.machine)["tensorrt"]
    assert machine.status == "problem"
    assert machine.text == "TensorRT 11.4 does not start (CUDA initialization failure with error: 35)"
    assert machine.remedy.startswith("update NVIDIA's driver")
    assert statuses(report.engines)["tensorrt"] == statuses(report.targets)["tensorrt"] == "problem"
    assert report.engine == "onnxruntime"


def test_a_tensorrt_that_is_too_old(make_gpu: MakeGpu) -> None:
    make_gpu("sm89", FakeTensorRT("tensorrt", "10.3"))
    finding = by_topic(examine().machine)["tensorrt"]
    assert finding.text == "TensorRT 10.3 is too old, expected 10.15 or newer"
    assert finding.remedy == "pip install 'cat-pruning[tensorrt]'"


def test_kernels_that_compute_something_else(make_gpu: MakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    make_gpu("sm89", TENSORRT)

    def fails(device: torch.device) -> None:
        raise EngineError("token_gather differs from torch")

    monkeypatch.setattr(cuda_launch, "plugin_self_test", fails)
    report = examine()
    plugin = by_topic(report.machine)["plugin"]
    assert plugin == Finding("plugin", "problem", "token_gather differs from torch", "update NVIDIA's driver")
    target = by_topic(report.targets)["tensorrt"]
    assert target.status == "warning"
    assert "with --no-plugin only" in target.text


def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_kernels.compile_ptx.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    machine = by_topic(examine().machine)
    for topic in ("nvrtc", "plugin"):
        assert (machine[topic].status, machine[topic].remedy) == ("warning", "pip install 'cat-pruning[tensorrt]'")
    assert machine["nvrtc"].text == "cuda.bindings is not installed"


def test_no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = examine()
    for finding in (by_topic(report.machine)["onnxruntime"], by_topic(report.engines)["onnxruntime"]):
        assert finding == Finding("onnxruntime", "problem", "onnxruntime is not installed", "pip install onnxruntime")
    assert (report.can_generate, report.engine) == (True, "torch")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("libnvinfer.so.11: cannot open shared object file"),
         Finding("x", "problem", "OSError: libnvinfer.so.11: cannot open shared object file", "do this")),
        (ImportError("two\n  lines"), Finding("x", "problem", "ImportError: two lines", "do this")),
        (EngineError("broken (a; b)", "mend it"), Finding("x", "problem", "broken (a; b)", "mend it")),
        (EngineError("broken"), Finding("x", "problem", "broken", "do this")),
        (ModuleNotFoundError("No module named 'abacus'", name="abacus"),
         Finding("x", "warning", "abacus is not installed", "pip install abacus")),
    ],
)  # fmt: skip
def test_an_error_is_a_finding(error: Exception, expected: Finding) -> None:
    def check() -> Finding:
        raise error

    assert isolated("x", check, remedy="do this", missing="warning") == expected
