from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from cat_pruning.exporter.checkpoint import find_checkpoint
from cat_pruning.exporter.families import FAMILIES
from cat_pruning.exporter.interception import StepModule
from cat_pruning.exporter.macs import StepMacs, count_graph_macs, count_macs, total_macs
from cat_pruning.exporter.step_graph import trace_step
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import StepDims

SD3 = find_checkpoint("sd3", random_weights=True).config
MEDIUM = {"batch": 2, "latent_height": 128, "latent_width": 128, "patch_size": 2, "text_length": 333}


def without_memory(config: Mapping[str, Any]) -> SD3Transformer2DModel:
    """A transformer whose weights are single zeros, expanded: of full size for the tracer, of none for the memory."""
    with accelerate.init_empty_weights():
        transformer = SD3Transformer2DModel(**config)
    for module in transformer.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))
    return transformer


@pytest.fixture(scope="module")
def medium() -> Callable[[int], StepMacs]:
    """SD3-medium's MACs of a step with so many tokens kept.

    From graphs of its width with 2 and 3 layers: the first and the last are in both, what the third adds is what
    each of the 21 others adds. (The graph of 24 layers, which takes minutes to trace, gave the same integers.)
    """
    graphs = [trace_step(StepModule(without_memory({**SD3, "num_layers": n}), FAMILIES[0])) for n in (2, 3)]

    def count(kept: int) -> StepMacs:
        dims = StepDims.of(**MEDIUM, num_kept=kept)
        two, three = (
            count_graph_macs(graph.clone(), FAMILIES[0].step_shapes({**SD3, "num_layers": layers}, dims))
            for layers, graph in zip((2, 3), graphs, strict=True)
        )
        linear, attention = three.linear - two.linear, three.attention - two.attention
        return StepMacs(two.linear + 22 * linear, two.attention + 22 * attention)

    return count


def by_hand(config: Mapping[str, Any], dims: StepDims) -> StepMacs:
    """What the modules of an SD3 transformer compute, written down from the architecture and not from a graph."""
    batch, patches, kept, text = (int(d) for d in (dims.batch, dims.num_tokens, dims.num_kept, dims.text_length))
    layers, width = config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]
    patch_values = config["patch_size"] ** 2
    embeddings = patches * config["in_channels"] * patch_values * width + text * config["joint_attention_dim"] * width
    conditioning = 256 * width + width * width + config["pooled_projection_dim"] * width + width * width
    stream = 4 * width * width + 2 * 4 * width * width  # q, k, v, out; an MLP four times as wide
    image = layers * (kept * stream + 6 * width * width)  # its adaLN makes six vectors from one
    rest_of_text = (layers - 1) * (text * stream + 6 * width * width)
    last_text = text * 3 * width * width + 2 * width * width  # only q, k, v: nobody reads its output
    end = 2 * width * width + kept * width * patch_values * config["out_channels"]
    scores = layers * (kept + text) * (patches + text) * 2 * width
    return StepMacs(batch * (embeddings + conditioning + image + rest_of_text + last_text + end), batch * scores)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kept", [1, 13, 40])
def test_the_tiny_model_against_a_count_by_hand(tiny_step: StepModule, tiny_onnx: Path, batch: int, kept: int) -> None:
    config = tiny_step.transformer.config
    dims = StepDims.of(batch=batch, latent_height=8, latent_width=20, patch_size=2, text_length=7, num_kept=kept)
    counted = count_macs(tiny_onnx, tiny_step.family.step_shapes(config, dims))
    assert counted == by_hand(config, dims)
    assert counted.total == counted.linear + counted.attention


def test_counting_reads_no_weights(tiny_step: StepModule, tiny_onnx: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny_onnx, tmp_path / "step.onnx")
    dims = StepDims.of(batch=1, latent_height=8, latent_width=8, patch_size=2, text_length=7, num_kept=4)
    shapes = tiny_step.family.step_shapes(tiny_step.transformer.config, dims)
    assert count_macs(tmp_path / "step.onnx", shapes).linear > 0


@pytest.mark.parametrize("kept", [4096, 1228])
def test_sd3_medium_against_a_count_by_hand(medium: Callable[[int], StepMacs], kept: int) -> None:
    assert medium(kept) == by_hand(SD3, StepDims.of(**MEDIUM, num_kept=kept))


def test_sd3_medium_against_the_paper(medium: Callable[[int], StepMacs]) -> None:
    settings = PruneSettings()
    full, pruned = medium(4096), medium(settings.num_kept(4096))
    assert (full.linear, full.attention) == (6_011_834_597_376, 2_892_502_941_696)
    assert (pruned.linear, pruned.attention) == (2_113_789_231_104, 1_019_461_976_064)
    assert full.linear == pytest.approx(6.010e12, rel=0.003)
    assert pruned.linear == pytest.approx(2.110e12, rel=0.003)
    assert total_macs(full.linear, full.linear, 28, settings) == pytest.approx(168.28e12, rel=0.003)
    assert total_macs(full.linear, pruned.linear, 28, settings) == pytest.approx(90.28e12, rel=0.003)
    assert total_macs(full.linear, full.linear, 50, settings) == pytest.approx(300.50e12, rel=0.003)
    assert total_macs(full.linear, pruned.linear, 50, settings) == pytest.approx(136.70e12, rel=0.003)
    assert full.total == pytest.approx(8.904e12, rel=0.003)
    assert pruned.total == pytest.approx(3.134e12, rel=0.003)


def test_totals_follow_the_schedule() -> None:
    settings = PruneSettings(full_steps=3, extra_full_steps=(5,))
    assert total_macs(100, 1, 8, settings) == 4 * 100 + 4
    assert total_macs(100, 1, 2, settings) == 200
