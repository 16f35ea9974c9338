"""Manifests whose family, config and graphs are not of one model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.engines.graph_family import family_of_bundle
from cat_pruning.errors import BundleError
from cat_pruning.runtime.engine_choice import engine_from_bundle
from cat_pruning.step_io import Part, cache_names


def edited(path: Path, config: dict[str, Any] | None = None, **changes: Any) -> Bundle:
    bundle = Bundle.open(path)
    changes["transformer_config"] = bundle.manifest.transformer_config | (config or {})
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update=changes))


def test_a_layer_whose_caches_no_graph_has(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle)
    last = cache_names(bundle.manifest.transformer_config["num_layers"])[-1]
    graphs = tuple(
        graph.model_copy(update={"inputs": tuple(tensor for tensor in graph.inputs if tensor.name != last)})
        for graph in bundle.manifest.graphs
    )
    with pytest.raises(BundleError, match=rf"step\.onnx has no {last}, which a layer of its config has"):
        family_of_bundle(edited(mini_bundle, graphs=graphs))


def test_a_bundle_as_it_was_exported(mini_bundle: Path) -> None:
    assert family_of_bundle(Bundle.open(mini_bundle)).name == "sd3"


FLUX = {"in_channels": 16, "num_single_layers": 1, "guidance_embeds": True, "axes_dims_rope": [8, 12, 12]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "dit"}, "model family 'dit' is not known"),
        ({"config": {"num_layers": -1}}, r"num_layers is -1 \("),
        ({"family": "flux"}, "the config is not a FluxTransformer2DModel's: num_single_layers is missing"),
        ({"family": "flux", "config": FLUX}, "its family flux is not that of a SD3Transformer2DModel"),
        ({"family": "flux", "config": FLUX, "transformer_class": "FluxTransformer2DModel"},
         r"timestep\.onnx reads layer_gates of shape \(\d+\), a FluxTransformer2DModel of its config has no such"),
        ({"config": {"num_layers": 3}}, r"reads layer_gates of shape \(\d+\), a SD3\S+ of its config has \(3\)"),
        ({"config": {"dual_attention_layers": [0]}}, r"reads key_cache_1 of shape \(batch, joint_rows, .*, num_tok"),
        ({"config": {"joint_attention_dim": 7}}, r"prompt\.onnx reads encoder_hidden_states of .* \(batch, text_len"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together(mini_bundle: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=rf"{message}.*; run cat-export again: cat-export --model") as caught:
        engine_from_bundle(edited(mini_bundle, **changes), "onnxruntime")
    assert "\n" not in str(caught.value)


def test_graphs_in_each_other_s_place(mini_bundle: Path) -> None:
    """What the manifest says of each is the other's."""
    bundle = Bundle.open(mini_bundle)
    prompt, timestep = (bundle.manifest.graph(part) for part in (Part.PROMPT, Part.TIMESTEP))
    graphs = tuple(
        graph.model_copy(update={"inputs": other.inputs, "outputs": other.outputs})
        for graph, other in ((prompt, timestep), (timestep, prompt))
    )
    step = bundle.manifest.graph(Part.STEP)
    with pytest.raises(BundleError, match=r"onnx has other inputs or outputs than the manifest says; run cat-export"):
        engine_from_bundle(edited(mini_bundle, graphs=(*graphs, step)), "onnxruntime")
