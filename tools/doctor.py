"""What this machine can do for cat-pruning: a list of findings, and what to install or to run for the rest.

Every check stands alone and imports what it looks at by itself, so that a broken library is a finding and not the end
of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from cat_pruning import __version__
from cat_pruning.bundle.bundle import Bundle
from cat_pruning.engines.plan_choice import plan_fit, runs_on
from cat_pruning.engines.tensorrt_library import first_error, library_log, tensorrt_library
from cat_pruning.errors import CatError, EngineError
from cat_pruning.installation import require
from cat_pruning.names import FLAVOURS, TITLES, Flavour, install_command

Status = Literal["ok", "warning", "problem"]

_PROVIDER: Final = "CUDAExecutionProvider"
_NEEDED: Final = ("diffusers", "pipeline")  # whatever the engine
_GPU_BUILD: Final = "pip uninstall onnxruntime, then pip install onnxruntime-gpu"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what was looked at; the same on every machine.
        status: "ok"; "warning", missing or limited, which may not matter; "problem", does not work here.
        text: what was found.
        remedy: what to install or to run; empty where there is nothing to do.
    """

    topic: str
    status: Status
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings.

    Attributes:
        version: of cat-pruning.
        bundle_path: which bundle was asked about.
        can_generate: from the bundle; without one, whether any engine runs here.
        engine: the one to generate with, auto's choice where that runs; None where none does.
        gpu: see `describe_gpu`; empty where that failed.
        machine: the GPU, its driver, the libraries, and the plugin.
        bundle: its pipeline and its plans.
        engines: topics are the values of `--engine`.
        targets: topics are the values of `--target`.
    """

    version: str
    bundle_path: str | None
    can_generate: bool
    engine: str | None
    gpu: dict[str, Any]
    machine: tuple[Finding, ...]
    bundle: tuple[Finding, ...]
    engines: tuple[Finding, ...]
    targets: tuple[Finding, ...]


def examine(bundle: Bundle | None = None) -> Report:
    """Look at this machine, and at what of a bundle it can run. Whatever fails on the way is a finding."""
    graphics = isolated("gpu", check_gpu, remedy="pip install --force-reinstall torch")
    pipelines = isolated("diffusers", check_diffusers, remedy="pip install --force-reinstall diffusers transformers")
    nvrtc = isolated("nvrtc", check_nvrtc, missing="warning")
    plugin = isolated("plugin", check_plugin, nvrtc, remedy="update NVIDIA's driver")
    machine = (
        isolated("torch", check_torch, remedy="pip install --force-reinstall torch"),
        isolated("driver", check_driver),
        graphics,
        isolated("onnxruntime", check_onnxruntime, remedy="pip install --force-reinstall onnxruntime"),
        pipelines,
        *(isolated(flavour, check_library, flavour, missing="warning") for flavour in TITLES),
        nvrtc,
        plugin,
    )
    engines = (
        *(isolated(flavour, check_plans_engine, flavour, bundle, graphics) for flavour in TITLES),
        isolated("onnxruntime", check_onnxruntime_engine, bundle),
        isolated("torch", check_torch_engine, bundle),
    )
    parts: tuple[Finding, ...] = ()
    if bundle is not None:
        plans = (isolated(f"plans {flavour}", check_plans, flavour, bundle) for flavour in TITLES)
        parts = (isolated("pipeline", check_pipeline, bundle), *plans)
    running = [finding.topic for finding in engines if finding.status != "problem"]
    auto, choice = _auto(bundle, running)
    complete = all(finding.status != "problem" for finding in (pipelines, *parts) if finding.topic in _NEEDED)
    return Report(
        version=__version__,
        bundle_path=str(bundle.path) if bundle else None,
        can_generate=bool(running) and complete,
        engine=choice,
        gpu=_gpu_facts(),
        machine=machine,
        bundle=parts,
        engines=(*engines, auto),
        targets=(
            isolated("onnx", check_onnx_target),
            *(isolated(flavour, check_plans_target, flavour, graphics, plugin) for flavour in FLAVOURS),
        ),
    )


def isolated(
    topic: str, check: Callable[..., Finding], *arguments: Any, remedy: str = "", missing: Status = "problem"
) -> Finding:
    """What `check` finds, or what it fails with.

    Args:
        topic: of the finding, if it fails.
        check: any of those below.
        arguments: for the check.
        remedy: for errors that name none.
        missing: the status if a module is not installed; of those that one can do without, a warning.
    """
    try:
        return check(*arguments)
    except Exception as error:  # noqa: BLE001  # a broken library may raise whatever it likes
        text, told = f"{type(error).__name__}: {error}", ""
        if isinstance(error, CatError):
            text, told = error.problem, error.remedy
        for cause in _causes(error):
            if isinstance(cause, ModuleNotFoundError) and cause.name:
                return Finding(topic, missing, f"{cause.name} is not installed", told or f"pip install {cause.name}")
        return Finding(topic, "problem", " ".join(text.split()), told or remedy)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


# The machine


def _gpu_facts() -> dict[str, Any]:
    try:
        from cat_pruning.engines.gpu import describe_gpu

        return describe_gpu()
    except Exception:  # noqa: BLE001  # of a broken torch, which `check_torch` reports
        return {}


def check_torch() -> Finding:
    """Its version and its CUDA build."""
    import torch

    built = f"built with CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return Finding("torch", "ok", f"{torch.__version__}, {built}")


def check_driver() -> Finding:
    """NVIDIA's driver, and the newest CUDA that it runs."""
    from cat_pruning.engines.gpu import driver_cuda_version, driver_version

    if (cuda := driver_cuda_version()) is None:
        return Finding("driver", "warning", "no NVIDIA driver", "if there is an NVIDIA GPU: install NVIDIA's driver")
    return Finding("driver", "ok", f"{driver_version() or 'version unknown'}, runs CUDA {cuda} and older")


def check_gpu() -> Finding:
    """The GPU, or why torch can use none."""
    from cat_pruning.engines.gpu import describe_gpu, missing_gpu

    gpu = describe_gpu()
    if gpu["architecture"]:
        return Finding("gpu", "ok", f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['architecture']}")
    driver, built = gpu["driver_cuda_version"], gpu["torch_cuda_version"]
    text = f"none that torch can use ({missing_gpu()})"
    if driver is None:
        remedy = "if there is an NVIDIA GPU: install NVIDIA's driver" + (
            "" if built else " and a torch built with CUDA"
        )
        return Finding("gpu", "warning", text, remedy)
    if built is None:
        remedy = f"install a torch built with CUDA {driver} or older"
    elif _numbers(built) > _numbers(driver):
        remedy = f"update NVIDIA's driver to one of CUDA {built}, or install a torch built with CUDA {driver} or older"
    else:
        remedy = "look at nvidia-smi, and at CUDA_VISIBLE_DEVICES if it is set"
    return Finding("gpu", "problem", text, remedy)


def check_onnxruntime() -> Finding:
    """Its version and its providers; whether it can use the GPU."""
    import onnxruntime

    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    text = f"{onnxruntime.__version__}, providers: {', '.join(providers)}"
    limit, remedy = _onnxruntime_limit()
    return Finding("onnxruntime", "warning" if limit else "ok", f"{text}; {limit}" if limit else text, remedy)


def check_diffusers() -> Finding:
    """Diffusers and transformers, which every pipeline is made of, imported as far as a model needs them.

    What one pipeline needs of them besides is `check_pipeline`'s.
    """
    import diffusers.models.modeling_utils
    import transformers

    return Finding("diffusers", "ok", f"{diffusers.__version__}, with transformers {transformers.__version__}")


def check_library(flavour: Flavour) -> Finding:
    """TensorRT or TensorRT-RTX: installed, new enough, and able to start."""
    return Finding(flavour, "ok", _started(flavour))


def check_nvrtc() -> Finding:
    """NVRTC, and cuda-bindings, by which we call it."""
    from cat_pruning.plugins.cuda_kernels import Specialization, compile_ptx

    compile_ptx(Specialization(word_bytes=16, index_bytes=8))  # says what is wrong, and how to mend it
    import cuda.bindings
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return Finding("nvrtc", "ok", f"{major}.{minor}, called by cuda-bindings {cuda.bindings.__version__}")


def check_plugin(nvrtc: Finding) -> Finding:
    """Our CUDA kernels: compiled anywhere, run where there is a GPU."""
    from cat_pruning.plugins.cuda_kernels import Specialization, compile_ptx

    if nvrtc.status != "ok":
        return Finding("plugin", nvrtc.status, "needs NVRTC", nvrtc.remedy)
    specializations = [
        Specialization(word_bytes, index_bytes) for word_bytes in (2, 4, 8, 16) for index_bytes in (4, 8)
    ]
    for specialization in specializations:
        compile_ptx(specialization)
    compiled = f"all {len(specializations)} specializations of its kernels compile"
    import torch

    from cat_pruning.engines.gpu import gpu_architecture
    from cat_pruning.plugins.cuda_launch import plugin_self_test

    if gpu_architecture() is None:
        return Finding("plugin", "ok", f"{compiled}; running them needs a GPU")
    plugin_self_test(torch.device("cuda", torch.cuda.current_device()))
    return Finding("plugin", "ok", f"{compiled}, and on this GPU compute what torch does")


# The bundle


def check_pipeline(bundle: Bundle) -> Finding:
    """Text encoders, VAE and scheduler, without which a bundle is only a transformer; their classes are imported."""
    from cat_pruning.runtime.pipeline import import_pipeline, pipeline_directory

    spec = bundle.manifest.pipeline
    if spec is not None and spec.kind == "hub":
        return Finding("pipeline", "warning", f"{spec.hub_id} on the hub: downloaded at the first use, if not before")
    directory = pipeline_directory(bundle)
    import_pipeline(directory)
    files = [path for path in directory.rglob("*") if path.is_file()]
    return Finding("pipeline", "ok", f"all {len(files)} files as they were exported")


def check_plans(flavour: Flavour, bundle: Bundle) -> Finding:
    """Whether the bundle's plans are of the installed version and for this GPU, as far as there are both."""
    from cat_pruning.engines.gpu import gpu_architecture

    topic, architecture = f"plans {flavour}", gpu_architecture()
    try:
        version, missing = _started(flavour), None
    except EngineError as error:
        version, missing = None, error
    fit = plan_fit(bundle, flavour, version=version, architecture=architecture)
    if fit.problem:
        where = "on the machine with the GPU: " if fit.rebuild == "tensorrt" and architecture is None else ""
        has = f"; the bundle has {fit.has}" if any(plan.flavour == flavour for plan in bundle.manifest.plans) else ""
        return Finding(topic, "warning", fit.problem + has, where + bundle.export_command(fit.rebuild))
    for spec in fit.plans.values():
        bundle.verified(spec.file)
    spec = next(iter(fit.plans.values()))
    plans = f"of version {spec.version} for {', '.join(spec.architectures)}"
    if missing is not None:
        return Finding(topic, "warning", f"{plans}; {TITLES[flavour]} does not run here", missing.remedy)
    if architecture is None:
        return Finding(topic, "warning", f"{plans}: the installed version, but there is no GPU to run them")
    return Finding(topic, "ok", f"{plans}: the installed version and this GPU, {architecture}")


# What runs


def check_plans_engine(flavour: Flavour, bundle: Bundle | None, graphics: Finding) -> Finding:
    """`--engine tensorrt` or `tensorrt_rtx`: with the bundle's plans, or with those that could be built here."""
    from cat_pruning.engines.builder.build import plan_specs
    from cat_pruning.engines.gpu import gpu_architecture

    if (architecture := gpu_architecture()) is None:
        return Finding(flavour, "problem", "needs an NVIDIA GPU", graphics.remedy)
    version = _started(flavour)
    if bundle is None:
        if not all(runs_on(spec, architecture) for spec in plan_specs(flavour)):
            problem = f"{TITLES[flavour]} builds no plans for {architecture}, this machine's GPU"
            return Finding(flavour, "problem", problem, "pip install 'cat-pruning[tensorrt]' and take TensorRT")
        return Finding(flavour, "ok", f"on the GPU, from plans of version {version} for {architecture}")
    fit = plan_fit(bundle, flavour, version=version, architecture=architecture)
    if fit.problem:
        return Finding(flavour, "problem", f"the bundle has {fit.problem}", bundle.export_command(fit.rebuild))
    for spec in fit.plans.values():
        bundle.verified(spec.file)
    return Finding(flavour, "ok", "on the GPU")


def check_onnxruntime_engine(bundle: Bundle | None) -> Finding:
    """`--engine onnxruntime`."""
    from cat_pruning.engines.onnxruntime_engine import check_dtype
    from cat_pruning.runtime.engine_choice import onnxruntime_device

    device = onnxruntime_device()
    if bundle is not None:
        check_dtype(bundle.manifest.dtype.torch, device)
        bundle.verify_graphs()
    limit, remedy = _onnxruntime_limit()
    if limit:
        status: Status = "problem" if device.type == "cuda" else "warning"  # its tensors would be on the GPU
        return Finding("onnxruntime", status, limit, remedy)
    return Finding("onnxruntime", "ok", _on(device))


def check_torch_engine(bundle: Bundle | None) -> Finding:
    """`--engine torch`, which needs the checkpoint that was exported."""
    import torch

    from cat_pruning.checkpoints.checkpoint import check_source
    from cat_pruning.engines import torch_engine as _  # noqa: F401  # with all that it imports

    where = _on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if bundle is None:
        return Finding("torch", "ok", where)
    source = bundle.manifest.source
    check_source(source)
    return Finding("torch", "ok", f"{where}, from the checkpoint {source.location}")


def _auto(bundle: Bundle | None, running: list[str]) -> tuple[Finding, str | None]:
    """`--engine auto`, and the engine to take."""
    runs = running[0] if running else None
    if bundle is None:
        planned = " or ".join(engine for engine in running if engine in TITLES)
        first = f"{planned} where a bundle has plans for it, else " if planned else ""
        return Finding("auto", "ok" if running else "problem", f"takes {first}onnxruntime"), runs

    chosen: list[str] = []

    def check() -> Finding:
        from cat_pruning.runtime.engine_choice import best_engine

        choice = best_engine(bundle)
        if choice in running:
            chosen.append(choice)
            return Finding("auto", "ok", f"takes {choice}")
        remedy = f"take --engine {runs}" if runs else ""
        return Finding("auto", "problem", f"takes {choice}, which does not run here", remedy)

    finding = isolated("auto", check)
    return finding, chosen[0] if chosen else runs


# What can be built


def check_onnx_target() -> Finding:
    """`--target onnx`."""
    require("cat-export", "export")
    from cat_pruning.exporter import export as _  # noqa: F401  # with all that it imports

    return Finding("onnx", "ok", "graphs for ONNX Runtime, and for plans")


def check_plans_target(flavour: Flavour, graphics: Finding, plugin: Finding) -> Finding:
    """`--target tensorrt` or `tensorrt_rtx`."""
    from cat_pruning.engines.builder.build import plan_specs
    from cat_pruning.engines.gpu import gpu_architecture

    if flavour == "tensorrt" and gpu_architecture() is None:
        return Finding(flavour, "problem", "needs the NVIDIA GPU that will run the plans", graphics.remedy)
    spec = plan_specs(flavour)[0]
    _started(flavour)
    text = f"{TITLES[flavour]} {spec.version} plans for {', '.join(spec.architectures)}"
    if flavour == "tensorrt" and plugin.status != "ok":
        return Finding(flavour, "warning", f"{text}, with --no-plugin only: the plugin {plugin.text}", plugin.remedy)
    return Finding(flavour, "ok", text + (" and later" if flavour == "tensorrt_rtx" else ""))


# What several ask


def _started(flavour: Flavour) -> str:
    """The version of TensorRT or TensorRT-RTX, which was imported and started.

    Raises:
        EngineError: it is missing, broken, too old, or does not go with the driver.
    """
    from cat_pruning.engines.gpu import gpu_architecture

    library = tensorrt_library(flavour)
    log, has_gpu = library_log(library), gpu_architecture() is not None
    with log.collected() as errors:
        try:
            if has_gpu or flavour == "tensorrt_rtx":  # whose builder needs none
                library.Builder(log.handle)
            if has_gpu:
                library.Runtime(log.handle)
        except (RuntimeError, TypeError, ValueError) as error:  # of the bindings, TypeError for a null pointer
            raise EngineError(
                f"{TITLES[flavour]} {library.__version__} does not start ({first_error(errors, str(error))})",
                f"update NVIDIA's driver, or install it again: {install_command(flavour)}",
            ) from error
    return str(library.__version__)


def _onnxruntime_limit() -> tuple[str, str]:
    """Why ONNX Runtime cannot use the GPU that there is, and the remedy; empty where it can, or where there is none."""
    import onnxruntime

    from cat_pruning.engines.gpu import gpu_architecture

    if gpu_architecture() is None:
        return "", ""
    if _PROVIDER not in onnxruntime.get_available_providers():
        return "on the CPU, for this build has no CUDA provider", _GPU_BUILD
    if _PROVIDER not in onnxruntime.InferenceSession(_smallest_graph(), providers=[_PROVIDER]).get_providers():
        return "its CUDA provider cannot be loaded", "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    return "", ""


def _smallest_graph() -> bytes:
    from onnx import TensorProto, helper

    value, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("value", "result"))
    graph = helper.make_graph([helper.make_node("Identity", ["value"], ["result"])], "identity", [value], [result])
    opset = helper.make_opsetid("", 17)
    content: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
    return content


def _on(device: Any) -> str:
    return "on the GPU" if device.type == "cuda" else "on the CPU"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
