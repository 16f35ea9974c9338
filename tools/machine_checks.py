"""What `cat-doctor` looks at of a machine: its GPU and driver, the libraries, our plugin."""

from __future__ import annotations

from typing import Any, Final

from cat_pruning.engines.tensorrt_library import first_error, library_log, tensorrt_library
from cat_pruning.errors import EngineError
from cat_pruning.names import TITLES, Flavour, install_command
from cat_pruning.tools.findings import Finding

_PROVIDER: Final = "CUDAExecutionProvider"
_GPU_BUILD: Final = "pip uninstall onnxruntime, then pip install onnxruntime-gpu"


def gpu_facts() -> dict[str, Any]:
    """See `describe_gpu`; empty where that fails."""
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
    limit, remedy = onnxruntime_limit()
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
    return Finding(flavour, "ok", started(flavour))


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


def started(flavour: Flavour) -> str:
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


def onnxruntime_limit() -> tuple[str, str]:
    """Why ONNX Runtime cannot use the GPU that there is, and the remedy; empty where it can, or where there is none."""
    import onnxruntime

    from cat_pruning.engines.gpu import gpu_architecture
    from cat_pruning.engines.onnxruntime_sessions import quiet_session

    if gpu_architecture() is None:
        return "", ""
    if _PROVIDER not in onnxruntime.get_available_providers():
        return "on the CPU, for this build has no CUDA provider", _GPU_BUILD
    if _PROVIDER not in quiet_session(_smallest_graph(), [_PROVIDER]).get_providers():
        return "its CUDA provider cannot be loaded", "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    return "", ""


def _smallest_graph() -> bytes:
    from onnx import TensorProto, helper

    value, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("value", "result"))
    graph = helper.make_graph([helper.make_node("Identity", ["value"], ["result"])], "identity", [value], [result])
    opset = helper.make_opsetid("", 17)
    content: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
    return content


def where(device: Any) -> str:
    """On what a device is, in words."""
    return "on the GPU" if device.type == "cuda" else "on the CPU"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
