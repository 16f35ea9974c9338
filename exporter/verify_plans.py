"""Do the plans, and the layers, compute what torch computes? Told by Polygraphy's Comparator.

A step is sampled while the module is in memory: its inputs, and what torch computes of them. The three graphs are then
run in turn by every runner there is (ONNX Runtime, and a plan where one runs on this machine), each on the same inputs:
what one graph takes from another is what ONNX Runtime computed. So the first result that differs, in the order in which
they are computed, is where the mistake is. ONNX Runtime does not compute in bf16 on a CPU: there a plan is held against
torch alone, and takes its own results.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from cat_pruning import step_io
from cat_pruning.bundle.schema import GraphSpec, PlanSpec
from cat_pruning.dtype import DType
from cat_pruning.engines.builder.build import build_plan
from cat_pruning.engines.gpu import gpu_architecture
from cat_pruning.engines.onnxruntime_sessions import ORT_ERRORS, quiet_session
from cat_pruning.engines.plan_choice import runs_on
from cat_pruning.errors import EngineError
from cat_pruning.exporter.layers import layer_outputs, marked_graphs, recorded
from cat_pruning.exporter.step_graph import example_inputs, run_step
from cat_pruning.exporter.verify import LAYERS_REMEDY, QUANTIZED_TOLERANCE, TOLERANCE, compare
from cat_pruning.families.interception import StepModule
from cat_pruning.names import TITLES, Quantization
from cat_pruning.step_io import Part, StepDims

_TORCH, _ONNXRUNTIME = "torch", "ONNX Runtime"

MakeRunner = Callable[[Part], Any]  # of a plan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """A step and what torch computes in it.

    inputs: by name. expected: of every graph, tensors by their names in it, in the order in which they are computed.
    layers: of every graph, the names of those tensors that are a layer's output -> the layer.
    in_place: the inputs whose memory a plan with our plugin shares with its outputs.
    """

    dims: StepDims
    inputs: Mapping[str, Tensor]
    expected: Mapping[Part, Mapping[str, Tensor]]
    layers: Mapping[Part, Mapping[str, str]]
    in_place: frozenset[str]


def can_verify(plan: PlanSpec) -> bool:
    """Whether this machine has a GPU that runs the plan."""
    architecture = gpu_architecture()
    return architecture is not None and runs_on(plan, architecture)


def sample_outputs(step: StepModule, dims: StepDims, given: Mapping[str, Tensor] | None = None) -> StepSample:
    """A step's results at `dims`, in torch on the module's device. Holds the caches twice.

    given: inputs by name; the others are random.
    """
    inputs = example_inputs(step, dims) | dict(given or {})
    return _sample(step, dims, inputs, {part: {} for part in Part}, _ordered(run_step(step, inputs)), {})


def sample_layers(step: StepModule, dims: StepDims, directory: Path) -> StepSample:
    """The same, with what every layer of the graphs in `directory` computes. Holds all of that."""
    graphs = {part: onnx.load(directory / part.onnx, load_external_data=False).graph for part in Part}
    layers = {part: layer_outputs(graph) for part, graph in graphs.items()}
    inputs = example_inputs(step, dims)
    with recorded(step.transformer, {layer for named in layers.values() for layer in named.values()}) as results:
        outputs = run_step(step, inputs)
    run = {part: {name: layer for name, layer in named.items() if layer in results} for part, named in layers.items()}
    return _sample(step, dims, inputs, run, _ordered(outputs), results)


def _sample(
    step: StepModule,
    dims: StepDims,
    inputs: Mapping[str, Tensor],
    layers: Mapping[Part, Mapping[str, str]],
    outputs: Mapping[str, Tensor],
    results: Mapping[str, Tensor],
) -> StepSample:
    names = step_io.cache_names(len(step.family.caches()))
    return StepSample(
        dims=dims,
        inputs=inputs,
        expected={
            part: {name: results[layer] for name, layer in layers[part].items()}
            | (dict(outputs) if part is Part.STEP else {})
            for part in Part
        },
        layers=layers,
        in_place=frozenset([*names, step_io.NOISE] if step.family.noise_is_tokens else names),
    )


def _ordered(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A step's outputs with the noise last, as it is computed."""
    last = step_io.output_name(step_io.NOISE)
    return {name: outputs[name] for name in sorted(outputs, key=lambda name: name == last)}


def verify_plans(
    plans: Sequence[PlanSpec],
    directory: Path,
    graphs: Sequence[GraphSpec],
    sample: StepSample,
    dtype: DType,
    quantization: Quantization | None = None,
) -> float:
    """Hold the plans of one flavour in `directory` against ONNX Runtime and torch; the largest relative error.

    Runs them on torch's current GPU, and waits for it.

    quantization: of the step, which torch computed without: its error is added to the tolerance of the dtype.

    Raises:
        EngineError: a result differs by more than the tolerance, or something does not run.
        ShapeError: the plans have no profile for the sample.
    """
    make = _plan_runners(plans, {str(plan.part): directory / plan.file for plan in plans}, graphs, sample)
    return compare_graphs({part: directory / part.onnx for part in Part}, sample, dtype, make, quantization)


def verify_layers(
    directory: Path, sample: StepSample, dtype: DType, plans: Sequence[PlanSpec] = (), graphs: Sequence[GraphSpec] = ()
) -> float:
    """Hold every layer of the graphs in `directory` against torch: under ONNX Runtime, or in plans of one flavour.

    plans: what to build for that, from the graphs with their layers marked; they are removed afterwards. A marked layer
    is fused with nothing, so the plans differ from those of the bundle.

    Raises:
        EngineError: a layer differs by more than the tolerance of the dtype, or something cannot be built or run.
    """
    with marked_graphs(directory, sample.layers) as marked, tempfile.TemporaryDirectory(dir=directory) as folder:
        files = {str(plan.part): Path(folder) / f"{plan.part}.plan" for plan in plans}
        for plan in plans:
            graph = next(graph for graph in graphs if graph.part is plan.part)
            shapes = graph.input_shapes(sample.dims)
            build_plan(plan, marked[graph.part], files[graph.part], [{name: (s, s, s) for name, s in shapes.items()}])
        make = _plan_runners(plans, files, graphs, sample) if plans else None
        return compare_graphs(marked, sample, dtype, make)


def _plan_runners(
    plans: Sequence[PlanSpec], files: Mapping[str, Path], graphs: Sequence[GraphSpec], sample: StepSample
) -> MakeRunner:
    from cat_pruning.exporter.plan_runner import PlanRunner

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def make(part: Part) -> PlanRunner:
        plan = next(plan for plan in plans if plan.part is part)
        graph = next(graph for graph in graphs if graph.part is part)
        shapes = {tensor.name: tensor.shape_at(sample.dims) for tensor in graph.outputs}
        return PlanRunner(
            plan.flavour,
            files[part],
            output_shapes=shapes | {name: tuple(tensor.shape) for name, tensor in sample.expected[part].items()},
            in_place=sample.in_place if plan.token_ops == "plugin" and part is Part.STEP else (),
            device=device,
            name=f"{TITLES[plan.flavour]}'s plan",
        )

    return make


def compare_graphs(
    graphs: Mapping[Part, Path],
    sample: StepSample,
    dtype: DType,
    make_plan_runner: MakeRunner | None = None,
    quantization: Quantization | None = None,
) -> float:
    """Run the graphs, and the plans if there are any, on the sample; return the largest relative error.

    Raises:
        EngineError: a result differs by more than the tolerance, or something does not run.
    """
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    values, worst = dict(sample.inputs), 0.0
    for part in Part:
        runners = [] if dtype is DType.BF16 else [_onnxruntime_runner(graphs[part])]
        if make_plan_runner is not None:
            runners.append(make_plan_runner(part))
        names = {value.name for value in onnx.load(graphs[part], load_external_data=False).graph.input}
        inputs = {name: value for name, value in values.items() if name in names}
        try:
            with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # what it has to say is in our error
                judge = _Judge(part, sample, dtype, quantization if part is Part.STEP else None)
                results = _compare_part(part, inputs, runners, sample, judge)
        except (PolygraphyException, *ORT_ERRORS) as error:
            raise EngineError(f"--verify: {part.onnx} does not run: {' '.join(str(error).split())}") from error
        values |= results
        worst = max(worst, judge.worst)
    return worst


def _onnxruntime_runner(graph: Path) -> Any:
    from polygraphy.backend.onnxrt import OnnxrtRunner

    return OnnxrtRunner(lambda: quiet_session(graph), name=_ONNXRUNTIME)


def _compare_part(
    part: Part, inputs: Mapping[str, Tensor], runners: Sequence[Any], sample: StepSample, judge: _Judge
) -> dict[str, Tensor]:
    """What the first runner computes."""
    from polygraphy.comparator import Comparator, IterationResult, RunResults

    ran = Comparator.run(runners, data_loader=[dict(inputs)])
    everything = RunResults()
    if sample.expected[part]:
        everything.append((_TORCH, [IterationResult(dict(sample.expected[part]), runtime=0.0, runner_name=_TORCH)]))
    everything.extend(ran)
    names = [name for name, _ in everything]
    pairs = [(before, after) for after in range(len(names)) for before in range(after)]
    if pairs:
        Comparator.compare_accuracy(everything, compare_func=judge, comparisons=pairs)
    if judge.error is not None:
        raise judge.error
    (first,) = ran[runners[0].name]
    return dict(first.items())


class _Judge:
    """Polygraphy's comparison function: our measure and tolerances, and the first result that fails it, in words."""

    def __init__(self, part: Part, sample: StepSample, dtype: DType, quantization: Quantization | None) -> None:
        self._part, self._dims, self._layers, self._dtype = part, sample.dims, sample.layers[part], dtype
        self._tolerance, self._expected = TOLERANCE[dtype], f"rounding in {dtype}"
        self._remedy = "" if self._layers else LAYERS_REMEDY
        if quantization is not None:
            self._tolerance += QUANTIZED_TOLERANCE[quantization]
            self._expected += f" and the error of {quantization}"
            self._remedy = "export it without quantization"
        self.worst = 0.0
        self.error: EngineError | None = None

    def __call__(self, expected: Any, results: Any) -> dict[str, bool]:
        """Whether each of the results that both have is right, by name."""
        both = {name: value for name, value in expected.items() if name in results}
        error, divergence = compare(dict(results.items()), both, self._dtype, self._tolerance)
        self.worst = max(self.worst, error)
        if divergence is not None and self.error is None:
            layer = self._layers.get(divergence.name)
            what = divergence.name if layer is None else f"the layer {layer} (tensor {divergence.name})"
            self.error = EngineError(
                f"--verify: {self._part.onnx} with {self._dims.num_kept} of {self._dims.num_tokens} tokens: {what} is "
                f"the first of its results in {results.runner_name} to be off {expected.runner_name}'s: by "
                f"{divergence.error:.1e} of the largest value, where at most {self._tolerance:.0e} is {self._expected}",
                self._remedy,
            )
        return {name: divergence is None or name != divergence.name for name in both}
