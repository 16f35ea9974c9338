"""The split by data dependence: facts of the written files, found by walking their protos and not by the exporter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from cat_pruning.errors import EngineError
from cat_pruning.exporter.cache_readers import check_cache_readers
from cat_pruning.step_io import SYMBOLIC, Part, output_names

Dims = tuple[int | str, ...]


def declared(values: Any) -> dict[str, Dims]:
    return {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in values
    }


def load(export: Any, name: str) -> onnx.GraphProto:
    return onnx.load(export.directory / f"{name}.onnx", load_external_data=False).graph


def could_leave(graph: onnx.GraphProto, parts: Mapping[str, Part], readable: Mapping[Part, set[str]]) -> Iterator[str]:
    """The nodes that compute from inputs of one other graph alone, of sizes that it can read: they belong there.

    Args:
        graph: of the step.
        parts: the graph that each of its inputs belongs to or comes from.
        readable: the dynamic dimensions of the inputs of the other graphs.
    """
    shapes = declared(graph.input)
    sources: dict[str, set[Part]] = {name: {part} for name, part in parts.items()}
    sizes: dict[str, set[str]] = {}
    unpacked = set(parts)  # a pack and what comes out of it as it went in
    for node in graph.node:
        if node.op_type == "Shape":
            start = next(attribute.i for attribute in node.attribute if attribute.name == "start")
            sizes[node.output[0]] = {str(shapes[node.input[0]][start])}
            continue
        depends_on = set().union(*(sources.get(name, set()) for name in node.input))
        needs = set().union(*(sizes.get(name, set()) for name in node.input))
        if node.op_type in ("Split", "Squeeze") and node.input[0] in unpacked:
            unpacked.update(node.output)
        elif len(depends_on) == 1 and (part := next(iter(depends_on))) is not Part.STEP and needs <= readable[part]:
            yield f"{node.op_type} {node.output[0]}"
        for name in node.output:
            sources[name], sizes[name] = depends_on, needs


def dynamic(shapes: Mapping[str, Dims]) -> set[str]:
    return {dim for shape in shapes.values() for dim in shape if isinstance(dim, str)}


def test_nothing_in_the_step_depends_on_the_prompt_or_the_timestep_alone(tiny_export: Any) -> None:
    part_of = tiny_export.step.family.part_of
    step, hoisted = load(tiny_export, "step"), {part: load(tiny_export, part) for part in (Part.PROMPT, Part.TIMESTEP)}
    parts = {value.name: Part.STEP for value in step.input}
    parts |= {value.name: part for part, graph in hoisted.items() for value in graph.output}
    readable = {part: dynamic(declared(graph.input)) for part, graph in hoisted.items()}
    assert list(could_leave(step, parts, readable)) == []
    # The same question finds plenty in the step that was not split.
    whole = load(tiny_export, "whole")
    found = list(could_leave(whole, {value.name: part_of(value.name) for value in whole.input}, readable))
    assert len([node for node in found if node.startswith(("MatMul", "Gemm"))]) > 5


def test_every_node_of_the_other_graphs_is_used(tiny_export: Any) -> None:
    """So nothing is computed twice, or for nobody."""
    for part in Part:
        graph = load(tiny_export, part)
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        for node in graph.node:
            assert read & set(node.output), node.name
        assert {tensor.name for tensor in graph.initializer} <= read


def test_each_graph_reads_its_own_inputs(tiny_export: Any) -> None:
    family = tiny_export.step.family
    inputs = {part: declared(load(tiny_export, part).input) for part in Part}
    assert set(inputs[Part.PROMPT]) <= set(family.prompt_inputs)
    assert set(inputs[Part.TIMESTEP]) <= set(family.timestep_inputs)
    assert dynamic(inputs[Part.TIMESTEP]) == {"batch"}
    packs = {name for part in (Part.PROMPT, Part.TIMESTEP) for name in declared(load(tiny_export, part).output)}
    expected = family.step_shapes(SYMBOLIC)
    read = [name for part in Part for name in inputs[part] if name not in packs]
    assert sorted(read) == sorted(expected)  # every input of the unsplit step, in one graph each
    assert all(inputs[family.part_of(name)][name] == expected[name] for name in read)


def test_inputs_and_outputs_are_as_the_export_says(tiny_export: Any) -> None:
    for part, graph in tiny_export.graphs.items():
        written = load(tiny_export, part)
        assert declared(written.input) == {name: spec.shape for name, spec in graph.inputs.items()}
        assert declared(written.output) == {name: spec.shape for name, spec in graph.outputs.items()}
        types = [*graph.inputs.values(), *graph.outputs.values()]
        values = [*written.input, *written.output]
        assert [value.type.tensor_type.elem_type for value in values] == [spec.dtype.value for spec in types]
    outputs, expected = tiny_export.graphs[Part.STEP].outputs, tiny_export.graphs[Part.STEP].inputs
    caches = tiny_export.step.family.caches()
    assert list(outputs) == output_names(len(caches))
    assert all(spec == expected[name.removesuffix("_out")] for name, spec in outputs.items())


@pytest.mark.parametrize("part", [Part.PROMPT, Part.TIMESTEP])
def test_results_are_few_packed_inputs_of_the_step(tiny_export: Any, part: Part) -> None:
    packs, step = tiny_export.graphs[part].outputs, tiny_export.graphs[Part.STEP].inputs
    assert list(packs) == [f"{part}_states_{index}" for index in range(len(packs))]
    assert 1 <= len(packs) <= 2
    for name, spec in packs.items():
        assert step[name] == spec
        count, batch, *rest = spec.shape
        assert isinstance(count, int)
        assert batch == "batch"
        assert part is Part.PROMPT or all(isinstance(dim, int) for dim in rest)


# ------------------------------------------------------------------ what lies where

# By the family's name: the parameters of prompt.onnx and of timestep.onnx; all others are the step's.
LIES_IN = {
    "sd3": (r"context_embedder\.", r"time_text_embed\.|norm1\.linear|norm1_context\.linear|norm_out\.linear"),
    "pixart": (r"caption_projection\.|attn2\.to_[kv]\.", r"adaln_single\.|scale_shift_table"),
    "flux": (r"context_embedder\.", r"time_text_embed\.|norm1(_context)?\.linear|\.norm\.linear|norm_out\.linear"),
}


def test_every_parameter_lies_where_its_results_are_needed(tiny_export: Any) -> None:
    prompt, timestep = LIES_IN[tiny_export.step.family.name]
    names = {part: [tensor.name.removeprefix("transformer.").removesuffix(".T")
                    for tensor in load(tiny_export, part).initializer] for part in Part}  # fmt: skip
    found = {Part.PROMPT: 0, Part.TIMESTEP: 0, Part.STEP: 0}
    for name, _ in tiny_export.step.transformer.named_parameters():
        expected = Part.STEP
        if re.search(prompt, name):
            expected = Part.PROMPT
        elif re.search(timestep, name):
            expected = Part.TIMESTEP
        assert [part for part in Part if name in names[part]] == [expected], name
        found[expected] += 1
    assert all(found.values())


def test_the_graphs_hold_no_attention_but_the_step(tiny_export: Any) -> None:
    for part in (Part.PROMPT, Part.TIMESTEP):
        assert "Attention" not in {node.op_type for node in load(tiny_export, part).node}


def test_a_cache_is_read_by_its_scatter_alone(tiny_export: Any) -> None:
    """Not even its shape is read: TensorRT may copy what a plugin changes in place for the sake of another reader."""
    graph = load(tiny_export, "step")
    caches = [value.name for value in graph.input if "_cache_" in value.name]
    assert len(caches) == 2 * len(tiny_export.step.family.caches())
    readers = {name: [node.op_type for node in graph.node if name in node.input] for name in (*caches, "noise")}
    assert all(readers[name] == ["TokenScatter"] for name in caches)
    # In FLUX the noise is tokens already, elsewhere the scatter's input is made of it.
    assert readers["noise"] == (["TokenScatter"] if tiny_export.step.family.name == "flux" else ["Reshape"])


@pytest.mark.parametrize("kind", ["sd3"])
def test_a_cache_with_another_reader_is_refused(tiny_export: Any) -> None:
    model = ir.load(tiny_export.directory / "step.onnx")
    check_cache_readers(model)
    cache = next(value for value in model.graph.inputs if value.name == "value_cache_1")
    model.graph.append(ir.node("Shape", [cache]))
    with pytest.raises(EngineError, match=r"reads value_cache_1 in TokenScatter, Shape, expected its scatter alone"):
        check_cache_readers(model)
