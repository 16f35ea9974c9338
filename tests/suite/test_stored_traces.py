"""A trace out of the store is torch's own, with the parameters of the module that it is asked for."""

from __future__ import annotations

import sys
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from store import Store
from stored_traces import description, stored_export
from torch import Tensor, nn

from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule


def export(module: nn.Module, **given: Any) -> Any:
    """Torch's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as `trace_step` does
        return torch.onnx.export.__wrapped__(module, **given)  # type: ignore[attr-defined]


class Scaled(nn.Module):
    """A weight, a buffer with a meaning, and a number that becomes a constant."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.scale = scale
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x) * self.scale + self.shift)


def options() -> dict[str, Any]:
    dynamic = {"x": {0: torch.export.Dim.AUTO}}
    return {"kwargs": {"x": torch.ones(2, 3)}, "dynamo": True, "dynamic_shapes": dynamic, "optimize": False}


def nodes(model: ir.Model) -> list[tuple[str, list[str | None]]]:
    return [(node.op_type, [value and value.name for value in node.inputs]) for node in model.graph]


def test_a_stored_trace_is_torchs_own(tmp_path: Path) -> None:
    made = []

    def counted(module: nn.Module, **given: Any) -> Any:
        made.append(module)
        return export(module, **given)

    stored = stored_export(counted, Store(tmp_path))
    one, another = Scaled().eval(), Scaled().eval()
    first, second = stored(one, **options()).model, stored(another, **options()).model
    assert made == [one]
    expected = export(Scaled().eval(), **options()).model
    for model, module in ((first, one), (second, another)):
        assert nodes(model) == nodes(expected)
        assert list(model.graph.initializers) == list(expected.graph.initializers)
        assert [value.name for value in model.graph.inputs] == ["x"]
        assert model.graph.initializers["linear.weight"].const_value.raw is module.linear.weight
        assert model.graph.initializers["shift"].const_value.numpy().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("change", ["number", "buffer", "dtype", "hook", "layer", "option"])
def test_what_decides_a_graph_is_in_its_description(change: str) -> None:
    one, another, other_options = Scaled(), Scaled(3.0 if change == "number" else 2.0), options()
    assert description(one, options()) == description(Scaled(), options())
    if change == "buffer":
        another.shift[0] = 7
    elif change == "dtype":
        another.half()
    elif change == "hook":
        another.linear.register_forward_hook(lambda *_: None)
    elif change == "layer":
        another.linear = nn.Linear(3, 4, bias=False)
    elif change == "option":
        other_options["kwargs"] = {"x": torch.ones(2, 3, dtype=torch.float64)}
    assert description(another, other_options) != description(one, options())


@pytest.mark.parametrize("changed", ["forward", "hook"])
def test_code_that_only_a_test_has_is_in_the_description(tmp_path: Path, changed: str) -> None:
    """Its file is not among the sources that every trace depends on."""

    def described(name: str, source: str) -> str:
        file = tmp_path / name / "own.py"
        file.parent.mkdir()
        file.write_text(source)
        own: Any = module_from_spec(spec := spec_from_file_location("own", file))  # type: ignore[arg-type]
        sys.modules["own"] = own
        spec.loader.exec_module(own)  # type: ignore[union-attr]
        return description(own.make(), {})

    source = {
        "forward": (
            "from torch import nn\nclass Own(nn.Module):\n    def forward(self, x):\n        return 2 * x\nmake = Own\n"
        ),
        "hook": (
            "from torch import nn\ndef hook(_, args, x):\n    return 2 * x\n"
            "def make():\n    layer = nn.Linear(3, 4)\n    layer.register_forward_hook(hook)\n    return layer\n"
        ),
    }[changed]
    try:
        assert described("one", source) == described("same", source)
        assert described("other", source.replace("2 * x", "3 * x")) != described("again", source)
    finally:
        del sys.modules["own"]


@pytest.mark.parametrize("kind", ["sd3", "pixart", "flux-dev"])
def test_a_step_has_one_description_each_time(make_tiny: Any, kind: str) -> None:
    """Or no trace would be found again."""
    steps = [StepModule(model, family_of(model)) for model in (make_tiny(kind), make_tiny(kind))]
    assert description(steps[0], {}) == description(steps[1], {})
    assert " at 0x" not in description(steps[0], {})
