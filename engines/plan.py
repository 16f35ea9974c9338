"""A plan of TensorRT or TensorRT-RTX, deserialised: what it was built for, and contexts that check every answer."""

from __future__ import annotations

import contextlib
import mmap
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat_pruning.engines.cuda_graphs import capturing
from cat_pruning.engines.plan_caches import read_cache, write_cache
from cat_pruning.engines.side_stream import SideStream
from cat_pruning.engines.tensorrt_library import first_error, library_log, tensorrt_library
from cat_pruning.errors import EngineError, ShapeError
from cat_pruning.names import TITLES, Flavour
from cat_pruning.step_io import Shape

_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32}
_REMEDIES = {
    "driver version is insufficient|cudaError 35": "update NVIDIA's driver",
    "out of memory|OutOfMemory|memory could not be allocated": (
        "free memory on the device, or build for smaller images and batches"
    ),
}
Ranges = dict[str, tuple[Shape, Shape]]  # of one profile: input name -> smallest and largest shape


class Plan:
    """A deserialised engine, shared by every thread.

    Args:
        flavour: whose plan it is.
        file: the plan; its hash and version were checked.
        device: where it runs.
        kernels: where the kernels that TensorRT-RTX compiles for this GPU are kept between two processes.

    Attributes:
        inputs, outputs: the dtypes of its tensors, by name.
        profiles: the shapes that it was built for.
        scratch_bytes: what a context needs besides its tensors, at the largest profile.

    Raises:
        EngineError: the library is not installed, or refuses the plan.
    """

    def __init__(self, flavour: Flavour, file: Path, device: torch.device, kernels: Path | None = None) -> None:
        self._library = tensorrt_library(flavour)
        self._log = library_log(self._library)
        self._title = f"{TITLES[flavour]} {self._library.__version__}"
        self._file, self._device = file, device
        with capturing, self._log.collected() as errors, _current(device):
            try:
                self._runtime = self._library.Runtime(self._log.handle)
                with file.open("rb") as opened:
                    content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
                self._engine = self._runtime.deserialize_cuda_engine(content)
            except (RuntimeError, TypeError, ValueError) as error:  # what the bindings make of a null pointer
                raise self._error("cannot load it", [*errors, str(error)]) from error
            if self._engine is None:
                raise self._error("cannot load it", errors)
            self._read_tensors()
            self._kernels = kernels
            self._kernel_cache: Any = None
            self._kept_kernels: bytes | None = None
            self._config = self._runtime_config(errors) if flavour == "tensorrt_rtx" else None

    def _read_tensors(self) -> None:
        engine, mode = self._engine, self._library.TensorIOMode
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        dtypes = {name: self._dtype(name) for name in names}
        self.inputs = {name: dtypes[name] for name in names if engine.get_tensor_mode(name) == mode.INPUT}
        self.outputs = {name: dtypes[name] for name in names if name not in self.inputs}
        self.profiles: list[Ranges] = []
        for profile in range(engine.num_optimization_profiles):
            shapes = {name: engine.get_tensor_profile_shape(name, profile) for name in self.inputs}
            self.profiles.append({name: (tuple(low), tuple(high)) for name, (low, _, high) in shapes.items()})
        self.scratch_bytes: int = engine.device_memory_size_v2

    def _dtype(self, name: str) -> torch.dtype:
        dtype = self._engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise self._error(f"its tensor {name} is {dtype}, expected one of {', '.join(_DTYPES)}", [])
        return _DTYPES[dtype]

    def profile_for(self, shapes: Mapping[str, Shape]) -> int:
        """The profile that holds inputs of these shapes.

        Raises:
            ShapeError: none does.
        """
        for index, ranges in enumerate(self.profiles):
            if all(_is_between(shapes[name], *ranges[name]) for name in self.inputs):
                return index
        nearest = max(self.profiles, key=lambda ranges: sum(_is_between(shapes[n], *ranges[n]) for n in self.inputs))
        unfit = next(name for name in self.inputs if not _is_between(shapes[name], *nearest[name]))
        built = " or ".join(dict.fromkeys(_range_text(*ranges[unfit]) for ranges in self.profiles))
        raise ShapeError(f"{unfit} has shape {tuple(shapes[unfit])}, the plan {self._file.name} was built for {built}")

    def context(self, profile: int, scratch: Tensor, stream: SideStream) -> PlanContext:
        """A context for a profile, which runs in `scratch` (at least `scratch_bytes`) and on `stream`.

        Raises:
            EngineError: the library refuses.
        """
        # One thread at a time, and none while another captures: this may allocate and wait for the device.
        with capturing, self._log.collected() as errors, _current(self._device):
            if self._config is not None:
                context = self._engine.create_execution_context(self._config)
            else:
                strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
                context = self._engine.create_execution_context(strategy)
            if context is None:
                raise self._error("cannot make an execution context", errors)
            context.set_device_memory(scratch.data_ptr(), scratch.numel())  # which answers in the log only
            if errors:
                raise self._error("refuses its scratch memory", errors)
            with stream.in_turn() as handle:
                chosen = context.set_optimization_profile_async(profile, handle)
            if not chosen:
                raise self._error(f"refuses its profile {profile}", errors)
        return PlanContext(self, context, scratch, stream)

    def _runtime_config(self, errors: list[str]) -> Any:
        """How TensorRT-RTX makes contexts: kernels compiled before the first run returns, and kept in a file."""
        library = self._library
        config = self._engine.create_runtime_config()
        if config is None:
            raise self._error("cannot make a runtime configuration", errors)
        config.set_execution_context_allocation_strategy(library.ExecutionContextAllocationStrategy.USER_MANAGED)
        # If kernels were compiled later, in the background, a captured step would keep the slower ones for ever.
        config.dynamic_shapes_kernel_specialization_strategy = library.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._kernels is not None:
            self._kernel_cache = config.create_runtime_cache()
            self._kept_kernels = read_cache(self._kernels)
            if self._kept_kernels is not None:
                # It returns False for another machine's kernels; the library then compiles them again.
                self._kernel_cache.deserialize(self._kept_kernels)
            if not config.set_runtime_cache(self._kernel_cache):
                raise self._error("refuses a runtime cache", errors)
        return config

    @property
    def refittable(self) -> bool:
        """Whether it was built so that `refit` can change its weights."""
        return bool(self._engine.refittable)

    def refit(self, weights: Mapping[str, Tensor], others: Callable[[str], Tensor]) -> None:
        """Replace weights in the engine. Waits for the device; nothing may run on the engine meanwhile.

        Contexts stay valid; captured launches are not promised to.

        Args:
            weights: by name; each is asked for once.
            others: the current values of weights that are not changed, where TensorRT has to know them too.

        Raises:
            EngineError: the library refuses. Some weights may have been replaced by then.
        """
        with capturing, self._log.collected() as errors, _current(self._device):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            refitter = self._library.Refitter(self._engine, self._log.handle)
            known = set(refitter.get_all_weights())
            given = [self._give(refitter, name, weights[name], known, errors) for name in weights]
            while missing := refitter.get_missing_weights():  # those that it has combined with the given ones
                given += [self._give(refitter, name, others(name), known, errors) for name in missing]
            if not refitter.refit_cuda_engine():
                raise self._error("cannot be refitted", errors)
            del given  # the weights had to live as long

    def _give(self, refitter: Any, name: str, weight: Tensor, known: set[str], errors: list[str]) -> Tensor:
        if name not in known:
            raise self._error(f"has no refittable weights {name}", errors)
        weight = weight.detach().contiguous().cpu()
        (dtype,) = (kind for kind, torch_dtype in _DTYPES.items() if torch_dtype is weight.dtype)
        view = self._library.Weights(getattr(self._library.DataType, dtype), weight.data_ptr(), weight.numel())
        if not refitter.set_named_weights(name, view):
            raise self._error(f"refuses the weights {name}", errors)
        return weight

    def keep_kernels(self) -> None:
        """Write the kernels that were compiled in this process to their file, if there is anything new."""
        if self._kernel_cache is None or self._kernels is None:
            return
        serialized = self._kernel_cache.serialize()
        if serialized is not None and (content := bytes(serialized)) != self._kept_kernels:
            write_cache(self._kernels, content)
            self._kept_kernels = content

    def _error(self, problem: str, errors: list[str]) -> EngineError:
        reason = f": {first_error(errors, '')}" if errors else ""
        remedies = (remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, reason, re.IGNORECASE))
        return EngineError(f"{self._file}: {self._title} {problem}{reason}", next(remedies, ""))


class PlanContext:
    """An execution context for one profile, which keeps the scratch memory that it runs in. Not thread-safe."""

    def __init__(self, plan: Plan, context: Any, scratch: Tensor, stream: SideStream) -> None:
        self._plan, self._context, self._scratch, self._stream = plan, context, scratch, stream
        self._bound: dict[str, tuple[int, torch.Size]] = {}
        self._ran = False

    def __del__(self) -> None:
        """Wait for the device: a context must not go while it runs."""
        if self._plan._device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # at the end of the process there may be no device any more
                torch.cuda.synchronize(self._plan._device)

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        """Run on the tensors given by name, contiguous and on the plan's device. Does not synchronise.

        Shapes and addresses that are still the last run's are not set again. The tensors must live until the work is
        done: those freed in the order of the current stream do. A context's first run under TensorRT-RTX compiles its
        kernels, and writes them to their file.

        Raises:
            EngineError: the library refuses.
        """
        with self._plan._log.collected() as errors, _current(self._plan._device):
            for name, dtype in (self._plan.inputs | self._plan.outputs).items():
                self._check(name, tensors[name], dtype)
                self._bind(name, tensors[name], errors)
            with self._stream.in_turn() as handle:
                done = self._context.execute_async_v3(handle)
            if not done:
                raise self._plan._error("failed in a step", errors)
        if not self._ran:
            self._ran = True
            self._plan.keep_kernels()

    def _check(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        """What would be read as something else, or crash the process."""
        plan = self._plan
        if tensor.dtype is not dtype:
            raise plan._error(f"takes {name} as {dtype}, not {tensor.dtype}", [])
        if tensor.device != plan._device or not tensor.is_contiguous():
            kind = "contiguous" if tensor.is_contiguous() else "strided"
            raise plan._error(f"takes {name} contiguous and on {plan._device}, not {kind} on {tensor.device}", [])

    def _bind(self, name: str, tensor: Tensor, errors: list[str]) -> None:
        new = (tensor.data_ptr(), tensor.shape)
        if (old := self._bound.get(name)) == new:
            return
        is_new = name in self._plan.inputs and (old is None or old[1] != tensor.shape)
        if is_new and not self._context.set_input_shape(name, tuple(tensor.shape)):
            raise self._plan._error(f"refuses the shape {tuple(tensor.shape)} of {name}", errors)
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise self._plan._error(f"refuses the address of {name}", errors)
        self._bound[name] = new


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _is_between(shape: Shape, lowest: Shape, highest: Shape) -> bool:
    return len(shape) == len(lowest) and all(
        int(low) <= int(size) <= int(high) for low, size, high in zip(lowest, shape, highest, strict=True)
    )


def _range_text(lowest: Shape, highest: Shape) -> str:
    return f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
