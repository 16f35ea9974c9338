"""A double of TensorRT's runtime: plans that are ONNX files, computed by ONNX Runtime at the addresses it was given.

It has the names and signatures of the real API and no others (`test_tensorrt_api.py` holds it against `tensorrt_rtx`
and `tensorrt_bindings`), and it refuses, loudly, what the real one only forbids: an address that is not set, scratch
memory that is too small, an output laid over an input that it does not share.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

SCRATCH_BYTES = 4096  # of every profile


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class DataType(enum.Enum):
    FLOAT = 0
    INT32 = 3
    INT64 = 8


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


_TYPES = {"tensor(float)": DataType.FLOAT, "tensor(int32)": DataType.INT32, "tensor(int64)": DataType.INT64}
_NUMPY = {DataType.FLOAT: np.float32, DataType.INT32: np.int32, DataType.INT64: np.int64}


class Misuse(Exception):
    """What the real API would answer with wrong results or a crash."""


def write_plan(
    file: Path,
    onnx: Path,
    profiles: Sequence[dict[str, Any]],
    aliases: dict[str, str],
    combined: Sequence[Sequence[str]] | None = None,
) -> None:
    """A plan of the double: which graph it computes, at which shapes, and which outputs must have an input's address.

    Which ones that are, nobody is told: TensorRT does not report the aliases of plugins.
    combined: not None for a refittable plan: groups of weights that can only be given together.
    """
    content = {"onnx": str(onnx), "profiles": profiles, "aliases": aliases, "combined": combined}
    file.write_text(json.dumps(content))


class TensorRTDouble:
    """What stands in for the module. `fail` names the calls that answer False or None from now on."""

    ILogger = ILogger
    TensorIOMode = TensorIOMode
    DataType = DataType
    Weights: Any = None
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy

    def __init__(self, version: str = "11.4.0") -> None:
        self.__version__ = version
        self.fail: set[str] = set()
        self.contexts: list[IExecutionContext] = []
        self.calls: list[str] = []
        self.on_launch: Callable[[Callable[[], None]], None] | None = None  # hears of every launch, for captures

    def Runtime(self, logger: ILogger) -> Runtime:
        return Runtime(self, logger)

    def Refitter(self, engine: ICudaEngine, logger: ILogger) -> Refitter:
        return Refitter(engine, logger)


class Runtime:
    def __init__(self, library: TensorRTDouble, logger: ILogger) -> None:
        self._library, self._logger = library, logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            self._logger.log(Severity.ERROR, "header.magicTag == kEXPECTED_MAGIC_TAG failed")
            return None
        return ICudaEngine(self._library, self._logger, plan)


class IRuntimeCache:
    def __init__(self) -> None:
        self._content = b""

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels"):
            return False
        self._content = blob
        return True

    def serialize(self) -> memoryview:
        return memoryview(self._content or b"kernels of this GPU")


class IRuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class ICudaEngine:
    def __init__(self, library: TensorRTDouble, logger: ILogger, plan: dict[str, Any]) -> None:
        self._library, self._logger = library, logger
        self._onnx, self._combined = plan["onnx"], plan.get("combined")
        self._weights: dict[str, Any] = {}  # those that were replaced
        self._load()
        self._inputs = {value.name: _TYPES[value.type] for value in self._session.get_inputs()}
        self._outputs = {value.name: _TYPES[value.type] for value in self._session.get_outputs()}
        self._profiles = plan["profiles"]
        self._aliases = plan["aliases"]

    def _load(self) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as the engine of ONNX Runtime
        for name, value in self._weights.items():
            options.add_initializer(name, value)
        self._session = onnxruntime.InferenceSession(self._onnx, options, providers=["CPUExecutionProvider"])

    @property
    def refittable(self) -> bool:
        return self._combined is not None

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return (self._inputs | self._outputs)[name]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        return list(self._profiles[profile_index][name])

    @property
    def device_memory_size_v2(self) -> int:
        return SCRATCH_BYTES

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy | IRuntimeConfig
    ) -> IExecutionContext | None:
        if "create_execution_context" in self._library.fail:
            self._logger.log(Severity.ERROR, "Requested amount of GPU memory could not be allocated: out of memory")
            return None
        if isinstance(strategy, IRuntimeConfig):
            assert strategy.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
            strategy = strategy._strategy
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise Misuse("every context would have scratch memory of its own")
        context = IExecutionContext(self)
        self._library.contexts.append(context)
        return context


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._library = engine, engine._library
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, int] | None = None

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < SCRATCH_BYTES:
            raise Misuse(f"{size} bytes of scratch memory, {SCRATCH_BYTES} are needed")
        self._scratch = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._library.calls.append("set_optimization_profile_async")
        if "set_optimization_profile_async" in self._library.fail:
            return False
        self._profile = profile_index
        return 0 <= profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._library.calls.append("set_input_shape")
        if self._profile is None:
            raise Misuse("no profile was set")
        low, _, high = self._engine._profiles[self._profile][name]
        if "set_input_shape" in self._library.fail or len(shape) != len(low):
            return False
        self._shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._library.calls.append("set_tensor_address")
        if name not in self._engine._inputs | self._engine._outputs or "set_tensor_address" in self._library.fail:
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._library.calls.append("execute_async_v3")
        if "execute_async_v3" in self._library.fail:
            self._engine._logger.log(Severity.ERROR, "CUDA error 700 launching a kernel")
            return False
        if self._scratch is None:
            raise Misuse("no scratch memory was set")
        # A capture keeps the addresses, shapes and weights of now, whatever is set later.
        launch = functools.partial(self._compute, self._engine._session, dict(self._shapes), dict(self._addresses))
        launch()
        if self._library.on_launch is not None:
            self._library.on_launch(launch)
        return True

    def _compute(self, session: Any, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine = self._engine
        inputs = {name: _memory(addresses, name, shapes[name], kind).copy() for name, kind in engine._inputs.items()}
        results = dict(zip(engine._outputs, session.run(None, inputs), strict=True))
        spans = {name: (addresses[name], value.nbytes) for name, value in inputs.items()}
        for name, result in results.items():
            address = addresses[name]
            shared = engine._aliases.get(name)
            if shared is not None and address != addresses[shared]:
                raise Misuse(f"{name} must share the memory of {shared}")
            for other, (start, size) in spans.items():
                if other != shared and address < start + size and start < address + result.nbytes:
                    raise Misuse(f"{name} lies over {other}")
            _memory(addresses, name, result.shape, engine._outputs[name])[...] = result


class Weights:
    """A view of somebody else's memory, in fp32."""

    def __init__(self, type: DataType, ptr: int, count: int) -> None:
        if type is not DataType.FLOAT:
            raise Misuse(f"weights of {type}")
        self._values = np.frombuffer((ctypes.c_char * (4 * count)).from_address(ptr), np.float32)


TensorRTDouble.Weights = Weights


class Refitter:
    """Weights go into the engine on `refit_cuda_engine`, from where they lie then."""

    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        if not engine.refittable:
            raise Misuse("the engine is not refittable")
        self._engine, self._logger = engine, logger
        graph = onnx.load(engine._onnx, load_external_data=False).graph
        self._shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self._given: dict[str, Weights] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._shapes)

    def get_missing_weights(self) -> list[str]:
        groups = [set(group) for group in self._engine._combined or ()]
        return sorted({name for group in groups if group & set(self._given) for name in group} - set(self._given))

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        if "set_named_weights" in self._engine._library.fail:
            self._logger.log(Severity.ERROR, "count mismatch")
            return False
        if weights._values.size != int(np.prod(self._shapes[name])):
            return False
        self._given[name] = weights
        return True

    def refit_cuda_engine(self) -> bool:
        self._engine._library.calls.append("refit_cuda_engine")
        if self.get_missing_weights() or "refit_cuda_engine" in self._engine._library.fail:
            self._logger.log(Severity.ERROR, "refit failed: out of memory")
            return False
        for name, weights in self._given.items():
            copy = weights._values.reshape(self._shapes[name]).copy()
            self._engine._weights[name] = onnxruntime.OrtValue.ortvalue_from_numpy(copy)
        self._engine._load()
        return True


def _memory(addresses: dict[str, int], name: str, shape: tuple[int, ...], kind: DataType) -> Any:
    if not addresses.get(name):
        raise Misuse(f"{name} has no address")
    dtype = np.dtype(_NUMPY[kind])
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(addresses[name]), dtype).reshape(shape)


def public_names() -> dict[str, list[str]]:
    """The double's classes, and what of the real ones of these names it stands for."""
    classes: tuple[type[Any], ...] = (
        ILogger, Runtime, ICudaEngine, IExecutionContext, IRuntimeConfig, IRuntimeCache, Refitter, Weights,
        TensorIOMode, DataType, ExecutionContextAllocationStrategy, DynamicShapesKernelSpecializationStrategy,
    )  # fmt: skip
    return {cls.__name__: [name for name in _names(cls) if not name.startswith("_")] for cls in classes}


def _names(cls: type[Any]) -> list[str]:
    if issubclass(cls, enum.Enum):
        return [member.name for member in cls]
    return [*vars(cls), *(["dynamic_shapes_kernel_specialization_strategy"] if cls is IRuntimeConfig else [])]
