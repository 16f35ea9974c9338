"""What inspectors of 10.x and 11.x say, and what they might."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builder_double import LAYERS

from cat_pruning.engines.builder.engine_layers import EngineLayers, count_layers

TEN: dict[str, Any] = {
    "Layers": [
        {"Name": "__myl_Fc_myl0_1", "LayerType": "gemm", "TacticName": "sm80_xmma_gemm_bf16bf16_tilesize128x128x32"},
        {"Name": "_gemm_mha_v2_myl0_12", "LayerType": "kgen", "TacticName": "_gemm_mha_v2_0x1f0c"},
        {"Name": "node_TokenScatter_7", "LayerType": "PluginV3", "PluginType": "TokenScatter"},
        {"Name": "node_Attention_3", "LayerType": "kgen", "TacticName": "__myl_MaxrSubExpSum"},
    ],
    "Bindings": ["noise", "noise_out"],
}
ELEVEN: dict[str, Any] = {
    "Layers": [
        {"Name": "fc_1", "LayerType": "gemm", "TacticName": "sm90_xmma_gemm"},
        {"Name": "attention_1", "LayerType": "fused_mha", "TacticName": "sm90_flash_attention_fprop"},
        {"Name": "attention_2", "LayerType": "kgen", "TacticName": "fmha_v2_bf16_S_64"},
        {"Name": "node_TokenScatter_7", "LayerType": "plugin_v3"},
    ],
    "I/O Tensors": [{"Name": "noise"}],
}


@pytest.mark.parametrize(
    ("information", "expected"),
    [
        (TEN, (4, 1, 1)),
        (ELEVEN, (4, 1, 2)),
        (ELEVEN["Layers"], (4, 1, 2)),  # a bare list
        ({"layers": TEN["Layers"]}, (4, 1, 1)),
        (LAYERS, (3, 1, 0)),
        ({"Layers": []}, (0, 0, 0)),
        ({"Layers": ["a", "b"]}, (2, None, None)),  # of low verbosity: names
        ({"Layers": [{"Name": "a"}, {"LayerType": None}, {}]}, (3, 0, 0)),
        ({"Layers": {"0": "a"}}, (None, None, None)),
        ({"Bindings": []}, (None, None, None)),
        ("a word", (None, None, None)),
        (7, (None, None, None)),
        (None, (None, None, None)),
    ],
)
def test_layers_are_counted(information: object, expected: tuple[int | None, ...]) -> None:
    layers, plugins, fused = expected
    assert count_layers(json.dumps(information)) == EngineLayers(layers=layers, plugins=plugins, fused_attention=fused)


@pytest.mark.parametrize("information", ["", "{ no JSON", None, 3, b"\xff\xfe"])
def test_what_is_no_json(information: object) -> None:
    assert count_layers(information) == EngineLayers()
