"""The process that builds one plan: a `PlanJob` as JSON on standard input, a `PlanReport` as JSON on standard output.

One code for TensorRT and TensorRT-RTX. The plan is streamed into its file while it is serialised, so that it never
lies in memory as a whole. TensorRT's plan is then loaded once, and the engine asked what it runs; a plan that was built
is never lost to what cannot be found out about it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import mmap
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_pruning.bundle.profiles import PlanProfile
from cat_pruning.bundle.schema import AttentionKernels
from cat_pruning.engines.builder.engine_layers import count_layers
from cat_pruning.engines.builder.fused_attention import (
    attention_layers,
    make_decomposable,
    score_matrix_bytes,
    why_not_fused,
    write_decomposable,
)
from cat_pruning.engines.plan_caches import read_cache, write_cache
from cat_pruning.engines.tensorrt_library import Log, first_error, library_log, tensorrt_library
from cat_pruning.errors import EngineError
from cat_pruning.names import Flavour

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = re.compile("out of memory|OutOfMemory", re.IGNORECASE)  # of which a second build would die too


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanJob:
    """What to build.

    onnx, plan: files. profiles: (min, opt, max) of every input by name, per profile.
    plugin_nodes: how many nodes of each operator our plugins serve; nothing is registered where there are none.
    timing_cache: a file to read and write, of TensorRT; TensorRT-RTX measures nothing.
    architectures: of the GPUs that are to run the plan. only_these: TensorRT-RTX is to build for no others.
    refittable: weights can be replaced in the engine, by their initializers' names.
    """

    flavour: Flavour
    onnx: str
    plan: str
    profiles: Sequence[PlanProfile]
    plugin_nodes: Mapping[str, int]
    timing_cache: str | None
    architectures: Sequence[str] = ()
    only_these: bool = False
    refittable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What was built; None for what is not known: TensorRT-RTX's plans are not loaded, and an inspector may change.

    attention: what the builder was held to; None for a graph without attention. score_bytes: a whole score matrix of a
    full step. engine_layers, engine_plugins, fused_attention: see `EngineLayers`. scratch_bytes: what a context needs
    besides its tensors; as much as a score matrix, it may be one. warnings: in words.
    """

    attention: AttentionKernels | None = None
    score_bytes: int | None = None
    engine_layers: int | None = None
    engine_plugins: int | None = None
    fused_attention: int | None = None
    scratch_bytes: int | None = None
    warnings: tuple[str, ...] = ()


def build(job: PlanJob) -> PlanReport:
    """Build the plan, and look into TensorRT's.

    Raises:
        EngineError: the library is not there or refused the graph, in its own words; or it took no plugins.
        OSError: the plan cannot be written.
    """
    trt = tensorrt_library(job.flavour)
    log = library_log(trt)
    with log.collected() as errors:
        try:
            report = _build_plan(trt, log, job)
        except (RuntimeError, TypeError, ValueError) as error:  # of the bindings, TypeError for a null pointer
            raise _refused(job, first_error(errors, str(error))) from error
    return report if job.flavour == "tensorrt_rtx" else _inspect(trt, log, Path(job.plan), report)


def _build_plan(trt: Any, log: Log, job: PlanJob) -> PlanReport:
    if job.plugin_nodes:
        _register_plugins(trt)
    builder = trt.Builder(log.handle)
    network, parser = _parsed(trt, log, builder, job, Path(job.onnx))  # the parser owns the weights: it lives as long
    layers = attention_layers(trt, network)
    score_bytes = score_matrix_bytes(layers, job.profiles)
    config = _config(trt, builder, job)
    timings = _timing_cache(config, Path(job.timing_cache)) if job.timing_cache else None
    attention: AttentionKernels | None = "fused" if layers else None
    warnings: list[str] = []
    if layers and why_not_fused(layers, job.architectures) is not None:
        attention = "decomposable"
    else:
        with log.collected() as errors:
            try:
                _serialise(trt, builder, network, config, Path(job.plan))
            except RuntimeError as error:
                refusal = first_error(errors, str(error))
                if not layers or _OUT_OF_MEMORY.search(refusal) or _callback_errors(job):
                    raise RuntimeError(refusal) from error
                attention = "decomposable"
                warnings.append(f"fused attention was refused, and whatever the builder takes is built ({refusal})")
    if attention == "decomposable":
        if not make_decomposable(trt, layers):
            del layers, network, parser  # and the weights, before they come again
            network, parser = _parsed(trt, log, builder, job, write_decomposable(Path(job.onnx)))
        _serialise(trt, builder, network, config, Path(job.plan))
    del parser  # not before: the network refers to its weights
    if job.timing_cache and timings is not None:
        write_cache(Path(job.timing_cache), bytes(timings.serialize()))
    return PlanReport(attention=attention, score_bytes=score_bytes, warnings=tuple(warnings))


def _parsed(trt: Any, log: Log, builder: Any, job: PlanJob, onnx: Path) -> tuple[Any, Any]:
    """The network of a graph, whose plugins are ours, and the parser that owns its weights."""
    flags = [trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED]  # in 11, what every network is
    if job.plugin_nodes:
        flags.append(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    network = builder.create_network(sum(1 << int(flag) for flag in flags))
    parser = trt.OnnxParser(network, log.handle)
    with log.collected() as errors:
        if not parser.parse_from_file(str(onnx)):  # the log names the file or node, the parser what is wrong with it
            words = dict.fromkeys((*errors[:1], str(parser.get_error(0))))
            raise _refused(job, first_error([" ".join(words)], ""))
    layers = (network.get_layer(index) for index in range(network.num_layers))
    plugins = [layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    _check_plugins(len(plugins), job.plugin_nodes, trt.__version__)
    if job.plugin_nodes:
        _compile_kernels(plugins)
    return network, parser


def _register_plugins(trt: Any) -> None:
    try:
        from cat_pruning.plugins.tensorrt_plugin import register_token_plugins
    except ImportError as error:
        raise EngineError(
            f"the token plugin cannot be made here ({error})", "pip install 'cat-pruning[tensorrt]', or --no-plugin"
        ) from error
    register_token_plugins(trt)


def _compile_kernels(plugins: Sequence[Any]) -> None:
    """What the plugins will be asked for, now: in the middle of a build an error is a line on standard error."""
    from cat_pruning.plugins.tensorrt_plugin import compile_kernels

    for layer in plugins:
        compile_kernels(layer.get_input(0), layer.get_input(1))


def _callback_errors(job: PlanJob) -> list[str]:
    """What our plugins' own callbacks raised, which TensorRT does not pass on."""
    if not job.plugin_nodes:
        return []
    from cat_pruning.plugins.tensorrt_plugin import callback_errors

    return callback_errors


def _refused(job: PlanJob, problem: str) -> EngineError:
    """The library's refusal; where our plugins take part, with what they raised and how to do without them."""
    said = "".join(f"; the token plugin said: {words}" for words in _callback_errors(job)[:1])
    return EngineError(problem + said, "--no-plugin builds without our kernels" if job.plugin_nodes else "")


def _check_plugins(found: int, expected: Mapping[str, int], version: str) -> None:
    """That the parser took a plugin for each of our nodes: it prefers their function bodies without a word."""
    if found != sum(expected.values()):
        nodes = ", ".join(f"{count} {operator}" for operator, count in expected.items())
        raise EngineError(
            f"the plugin was asked for, and TensorRT {version} took the function bodies of the token operators "
            f"instead: {found} plugin layers, expected {sum(expected.values())} ({nodes})",
            "build with --no-plugin, which needs none",
        )


def _config(trt: Any, builder: Any, job: PlanJob) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector knows layers by name only
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is what was asked for, and what torch computes
    if job.flavour == "tensorrt_rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or a step may not be captured as a CUDA graph
    if job.only_these:
        config.num_compute_capabilities = len(job.architectures)
        for index, name in enumerate(job.architectures):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index):
                raise RuntimeError(f"it builds nothing for {name}")
    if job.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if job.plugin_nodes:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)  # scattered in place
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, (lowest, best, highest) in shapes.items():
            profile.set_shape(name, lowest, best, highest)
        if config.add_optimization_profile(profile) < 0:
            raise RuntimeError("it refused the shapes of a profile")
    return config


def _timing_cache(config: Any, path: Path) -> Any:
    """The timings of earlier builds, or none yet, attached to `config`."""
    cache = config.create_timing_cache(read_cache(path) or b"")
    if cache is None or not config.set_timing_cache(cache, False):
        logger.warning("%s is not of this TensorRT on this GPU and is ignored", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _serialise(trt: Any, builder: Any, network: Any, config: Any, plan: Path) -> None:
    class PlanFile(trt.IStreamWriter):  # type: ignore[misc]  # from an untyped module
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.file = plan.open("wb")
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return self.file.write(data)
            except OSError as error:  # must not cross the builder's frames
                self.error = error
                return 0

    output = PlanFile()
    with output.file:
        built = builder.build_serialized_network_to_stream(network, config, output)
    if output.error is not None:
        raise output.error
    if not built:
        raise RuntimeError("the builder refused the graph")


def _inspect(trt: Any, log: Log, plan: Path, report: PlanReport) -> PlanReport:
    """The report with what the engine itself says, which nothing here has run; without, if it says nothing."""
    with log.collected() as errors:
        try:
            with plan.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            runtime = trt.Runtime(log.handle)
            engine = runtime.deserialize_cuda_engine(data)
            if engine is None:
                raise RuntimeError("the plan was built and cannot be loaded")
            scratch = int(engine.device_memory_size_v2)
            inspector = engine.create_engine_inspector()
            found = count_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        except (RuntimeError, TypeError, ValueError, AttributeError, OSError) as error:
            words = f"the plan was built, and its engine could not be inspected: {first_error(errors, str(error))}"
            return dataclasses.replace(report, warnings=(*report.warnings, words))
    return dataclasses.replace(
        report,
        engine_layers=found.layers,
        engine_plugins=found.plugins,
        fused_attention=found.fused_attention,
        scratch_bytes=scratch,
    )


def main() -> int:
    """Build the job on standard input; 0 when it is built."""
    logging.basicConfig(level=os.environ.get("CAT_PRUNING_LOG", "WARNING").upper())
    job = PlanJob(**json.load(sys.stdin))
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries log there too
    try:
        built = build(job)
    except OSError as error:
        report.write(json.dumps({"errno": error.errno, "problem": error.strerror}) + "\n")
        return 1
    except EngineError as error:
        report.write(json.dumps({"problem": error.problem, "remedy": error.remedy}) + "\n")
        return 1
    report.write(json.dumps(dataclasses.asdict(built)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
