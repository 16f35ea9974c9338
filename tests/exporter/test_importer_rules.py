"""The importer's rules over every family's graphs in every dtype, and over graphs that break one each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from cat_pruning.bundle.profiles import plan_profiles, profile_spec
from cat_pruning.bundle.schema import Geometry
from cat_pruning.engines.builder.build import build_plan, can_build, plan_specs
from cat_pruning.exporter.export import graph_spec
from cat_pruning.exporter.importer_rules import importer_findings, model_findings
from cat_pruning.exporter.split import Graph
from cat_pruning.exporter.step_graph import export_step_graph
from cat_pruning.families import family_of
from cat_pruning.families.family import Family
from cat_pruning.families.interception import StepModule
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import NOISE, Part, output_name

Exported = tuple[Path, Family, dict[Part, Graph]]
BF16, FP16 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16


@pytest.fixture(scope="module")
def bf16_graphs(make_bf16: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The graphs of a kind in bf16, with one layer of each sort and heads of 16; traced once."""

    @functools.cache
    def export(kind: str) -> Exported:
        transformer = make_bf16(kind)
        directory = tmp_path_factory.mktemp(kind)
        step = StepModule(transformer, family_of(transformer))
        return directory, step.family, export_step_graph(step, directory)

    return export


def in_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph of bf16 as one of fp16: torch writes the same nodes for both."""
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == BF16:
            value.type.tensor_type.elem_type = FP16
    for tensor in model.graph.initializer:
        if tensor.data_type == BF16:
            tensor.data_type = FP16
    for node in model.graph.node:
        for attribute in node.attribute:
            if (node.op_type, attribute.name, attribute.i) == ("Cast", "to", BF16):
                attribute.i = FP16
    return model


@pytest.mark.parametrize("part", list(Part))
def test_every_graph_keeps_every_rule_in_fp32(tiny_export: Any, part: Part) -> None:
    assert importer_findings(tiny_export.directory / part.onnx) == []


@pytest.mark.parametrize("kind", ["sd3.5", "pixart-alpha", "flux-dev"])
@pytest.mark.parametrize("part", list(Part))
def test_every_graph_keeps_every_rule_in_16_bits(bf16_graphs: Callable[[str], Exported], kind: str, part: Part) -> None:
    path = bf16_graphs(kind)[0] / part.onnx
    model = onnx.load(path, load_external_data=False)
    assert BF16 in {tensor.data_type for tensor in model.graph.initializer}
    assert importer_findings(path) == []
    assert model_findings(in_fp16(model)) == []


@pytest.mark.long
@pytest.mark.skipif(not can_build("tensorrt_rtx"), reason="TensorRT-RTX is not installed; install '.[tensorrt-rtx]'")
@pytest.mark.parametrize("kind", ["sd3.5", "pixart-alpha", "flux-dev"])
def test_the_real_tensorrt_rtx_fuses_every_attention_in_bf16(
    bf16_graphs: Callable[[str], Exported], kind: str, tmp_path: Path
) -> None:
    directory, family, graphs = bf16_graphs(kind)
    geometry = Geometry(pixels_per_latent=8, patch_size=2, latent_channels=4, max_latent_size=None, text_length=7)
    settings, guidance = PruneSettings(num_clusters=4), family.batched_guidance
    profile = profile_spec(80, 64, 1, geometry=geometry, settings=settings, guidance=guidance)
    profiles = plan_profiles(graph_spec(Part.STEP, graphs[Part.STEP]), [profile], geometry.patch_size)
    report = build_plan(plan_specs("tensorrt_rtx")[-1], directory / "step.onnx", tmp_path / "step.plan", profiles)
    assert report.attention == "fused"
    assert not report.warnings


def test_the_noise_is_the_scatters_own_where_the_family_says_so(tiny_export: Any) -> None:
    """Else it may not be bound over its input: see `TensorRTSession._allocate`."""
    graph = onnx.load(tiny_export.directory / "step.onnx", load_external_data=False).graph
    pairs = [(node.input[0], node.output[0]) for node in graph.node if node.op_type == "TokenScatter"]
    assert ((NOISE, output_name(NOISE)) in pairs) is tiny_export.step.family.noise_is_tokens


# ------------------------------------------------------------------ graphs that break a rule

HEAD = '<ir_version: 10, opset_import: ["" : 23, "cat" : 1]>\n'
PLUGIN = '<plugin_namespace = "cat", plugin_version = "1", aot = 1>'
SCATTER = f"""{HEAD}step (float[B, S, 8] key_cache_0, int32[B, n] keep_indices, float[B, n, 8] rows)
    => (float[B, S, 8] key_cache_0_out)
    {{ key_cache_0_out = cat.TokenScatter {PLUGIN} (key_cache_0, keep_indices, rows) }}
<domain: "cat", opset_import: ["" : 23]>
TokenScatter <plugin_namespace, plugin_version, aot> (tokens, indices, rows) => (out) {{ out = Add (tokens, tokens) }}
"""
ATTENTION = (
    HEAD
    + """step (float16[B, 4, n, 16] q, float16[B, 4, S, 16] k, {mask} mask) => (float16[B, 4, n, 16] out)
    {{ out = Attention {attributes} ({inputs}) }}"""
)
WHOLE, SCALED = "float16[B, 1, n, S]", "<scale = 1.0>"


def attention(mask: str = WHOLE, attributes: str = SCALED, inputs: str = "q, k, k, mask") -> str:
    return ATTENTION.format(mask=mask, attributes=attributes, inputs=inputs)


def one(body: str, inputs: str = "float[2, 3] x", output: str = "float[2, 3] y", opset: int = 23) -> str:
    """One node of x to y."""
    return f'<ir_version: 11, opset_import: ["" : {opset}]>\ng ({inputs}) => ({output}) {{ y = {body} }}'


GOOD = {
    "attention with a mask": attention(),
    "attention without one": attention(inputs="q, k, k"),
    "an exact root": attention(attributes="<scale = 0.0625>"),
    "a scatter": SCATTER,
    "few of many": one("TopK (x, k)", "float[9, 5000] x", "float[9, 3840] y").replace(
        "{ y = TopK (x, k) }", "<int64[1] k = {3840}> { y, which = TopK (x, k) }"
    ),
}
BAD = {
    "an operator nobody looked up": (one("Relu (x)"), "the operator onnx::Relu was not looked up"),
    "an operator of another domain": (
        one("Neg (x)").replace("Neg", "elsewhere.Neg").replace('"" : 23', '"" : 23, "elsewhere" : 1'),
        "elsewhere::Neg was not looked up",
    ),
    "an attribute's value": (one("Mod <fmod = 1> (x, x)"), "fmod is 1, expected 0"),
    "a dtype": (one("Neg (x)", "double[2] x", "double[2] y"), "x is DOUBLE, expected"),
    "nine dimensions": (one("Neg (x)", f"float[{'2,' * 8}2] x", f"float[{'2,' * 8}2] y"), "x has 9 dimensions"),
    "a newer opset": (one("Neg (x)", opset=25), "opset 25, TensorRT 10.15 knows 24 at most"),
    "a mask of three dimensions": (attention("float16[B, n, S]"), "mask has 3 dimensions, expected 4"),
    "a mask of another dtype": (attention("bool[B, 1, n, S]"), "mask is BOOL, expected the queries' FLOAT16"),
    "a mask with one row": (attention("float16[B, 1, 1, S]"), "the mask mask has one row for all queries"),
    "a scale that would be rounded": (attention(attributes="<scale = 0.125>"), "its scale is 0.125"),
    "no scale": (attention(attributes=""), "its scale is not given"),
    "causal": (attention(attributes="<scale = 1.0, is_causal = 1>"), "is_causal is 1, expected 0"),
    "softcap": (attention(attributes="<scale = 1.0, softcap = 3.0>"), "softcap is 3.0, expected 0.0"),
    "past keys": (attention(inputs="q, k, k, mask, k, k"), "it has past keys or values"),
    "more than TopK takes": (GOOD["few of many"].replace("3840", "3841"), "K is 3841, expected a constant of 3840"),
    "a K that is computed": (
        HEAD + "g (float[9, 5000] x, int64[1] k) => (float[9, m] y) { y, which = TopK (x, k) }",
        "K is not a constant",
    ),
    "axes that are computed": (
        HEAD + "g (float[2, 3] x, int64[1] a) => (float[p, q] y) { y = ReduceMean (x, a) }",
        "its axes are not a constant",
    ),
    "a mean": (
        HEAD + "g (float[2, 3] x, float[3] w) => (float[2, 3] y) { y, mean = LayerNormalization (x, w) }",
        "it has 2 results, expected one",
    ),
    "indices of another dtype": (
        SCATTER.replace("int32", "uint8"),
        "its indices are UINT8, expected INT32 or INT64",
    ),
    "another plugin": (SCATTER.replace('plugin_version = "1"', 'plugin_version = "2"'), "plugin_version is 2"),
    "a cache that is read twice": (
        SCATTER.replace("=> (float[B, S, 8] key_cache_0_out)\n    {", "=> (float[B, S, 8] key_cache_0_out, int64[3] s) "
                        "{ s = Shape (key_cache_0)"),
        "key_cache_0 is changed in place and read by Shape, TokenScatter, expected its scatter alone",
    ),
    "a cache that is bound over another's": (
        SCATTER.replace("key_cache_0_out", "key_cache_1_out"),
        "key_cache_0 and key_cache_0_out are bound to one address and are no scatter's pair",
    ),
    "a function named like an operator": (
        SCATTER.replace("cat.TokenScatter", "cat.Neg").replace("TokenScatter <plugin", "Neg <plugin"),
        "the function Neg is named like an operator of ONNX",
    ),
    "a function named like the graph": (SCATTER.replace("step (", "TokenScatter ("), "is named like the graph"),
    "an operator in a function": (
        SCATTER.replace("Add (tokens, tokens)", "Relu (tokens)"), "TokenScatter, Relu out: the operator onnx::Relu"
    ),
    "shapes that do not fit": (one("Add (x, z)", "float[2, 3] x, float[2, 4] z"), "its shapes cannot be inferred"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_keeps_the_rules(name: str) -> None:
    assert model_findings(onnx.parser.parse_model(GOOD[name])) == []


@pytest.mark.parametrize("name", BAD)
def test_every_rule_fires(name: str) -> None:
    graph, expected = BAD[name]
    assert any(expected in finding for finding in model_findings(onnx.parser.parse_model(graph))), model_findings(
        onnx.parser.parse_model(graph)
    )


def test_two_functions_of_one_name() -> None:
    model = onnx.parser.parse_model(SCATTER)
    model.functions.append(model.functions[0])
    model.functions[1].domain = "elsewhere"
    assert "2 functions are named TokenScatter, and the importer goes by the name" in model_findings(model)


@pytest.mark.parametrize("rank", [2, 3])
def test_gemm_is_of_matrices(rank: int) -> None:
    """ONNX itself knows no other, so inference refuses it first; a name of unknown rank is found too."""
    model = onnx.parser.parse_model(one("Gemm (x, z)", "float[2, 3] x, float[3, 3] z"))
    if rank == 3:
        model.graph.input[0].type.tensor_type.ClearField("shape")
        assert any("x has None dimensions, expected 2" in finding for finding in model_findings(model))
    else:
        assert model_findings(model) == []
