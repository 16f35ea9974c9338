from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_pruning.checkpoints.random_weights import RandomWeights, hollow_transformer, random_transformer
from cat_pruning.dtype import DType
from cat_pruning.errors import InstallationError
from cat_pruning.exporter.step_graph import export_step_graph
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.step_io import Part

GIB = 1 << 30


def architecture(transformer: Any) -> tuple[str, dict[str, Any]]:
    """Class and config, as a checkpoint has them."""
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    return type(transformer).__name__, config


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_they_are_the_same_for_the_same_seed_and_normal(tiny_transformer: Any) -> None:
    of = architecture(tiny_transformer)
    one, same, other = (random_transformer(*of, DType.FP32, seed) for seed in (0, 0, 1))
    assert type(one) is type(tiny_transformer)
    assert not one.training
    assert same_weights(one, same)
    assert not same_weights(one, other)
    values = torch.cat([parameter.flatten() for parameter in one.parameters()])
    assert values.mean().item() == pytest.approx(0.0, abs=4e-4)
    assert values.std().item() == pytest.approx(0.02, rel=0.01)
    assert values.abs().max() > 0.06
    large = [parameter.flatten()[:8] for parameter in one.parameters() if parameter.numel() >= 8]
    assert len({tuple(values.tolist()) for values in large}) == len(large)  # a generator for each


def test_they_need_the_extra_of_exports(monkeypatch: pytest.MonkeyPatch, tiny_flux: Any) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InstallationError, match="random weights needs accelerate") as raised:
        random_transformer(*architecture(tiny_flux), DType.FP32, 0)
    assert raised.value.remedy == "pip install 'cat-pruning[export]'"


@pytest.mark.parametrize("dtype", list(DType))
def test_buffers_are_real(tiny_transformer: Any, dtype: DType) -> None:
    for module in (hollow_transformer(*architecture(tiny_transformer), dtype),
                   random_transformer(*architecture(tiny_transformer), dtype, 0)):  # fmt: skip
        assert {parameter.dtype for parameter in module.parameters()} == {dtype.torch}
        buffers, real = dict(module.named_buffers()), dict(tiny_transformer.named_buffers())
        assert buffers.keys() == real.keys()
        for name, buffer in buffers.items():
            assert torch.equal(buffer, real[name].to(dtype.torch)), name


def test_a_hollow_transformer_has_every_shape_and_no_memory(tiny_transformer: Any) -> None:
    hollow = hollow_transformer(*architecture(tiny_transformer), DType.BF16)
    shapes = {name: parameter.shape for name, parameter in tiny_transformer.named_parameters()}
    assert {name: parameter.shape for name, parameter in hollow.named_parameters()} == shapes
    assert all(parameter.untyped_storage().nbytes() == 2 for parameter in hollow.parameters())


@pytest.mark.parametrize("dtype", list(DType))
def test_made_one_at_a_time_they_are_those_made_at_once(tiny_transformer: Any, dtype: DType) -> None:
    of = architecture(tiny_transformer)
    weights = RandomWeights(hollow_transformer(*of, dtype), dtype, 3)
    for name, parameter in random_transformer(*of, dtype, 3).named_parameters():
        assert torch.equal(weights(name), parameter), name


def test_an_export_that_makes_them_while_it_writes_writes_the_same_bytes(make_bf16: Any, tmp_path: Path) -> None:
    of, dtype = architecture(make_bf16("pixart-alpha")), DType.BF16
    hollow, filled = hollow_transformer(*of, dtype), random_transformer(*of, dtype, 3)
    family = family_of(hollow)
    for name in ("streamed", "held"):
        (tmp_path / name).mkdir()
    weights = RandomWeights(hollow, dtype, 3)
    export_step_graph(StepModule(hollow, family), tmp_path / "streamed", weights=weights)
    export_step_graph(StepModule(filled, family), tmp_path / "held")
    for part in Part:
        for name in (part.onnx, f"{part.onnx}.data"):
            assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "held" / name).read_bytes(), name
    assert (tmp_path / "held" / "step.onnx.data").stat().st_size > 10_000
