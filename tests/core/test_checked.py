"""Arguments of another type are refused by the public functions at once, in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cat_pruning.checked import checked
from cat_pruning.dtype import torch_dtype_of
from cat_pruning.errors import ScheduleError, SettingsError
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.schedule import Schedule
from cat_pruning.settings import PruneSettings

SCHEDULE = Schedule.of(6, [0, 1, 3])


@checked
def example(path: str | Path, count: int = 3, *, ratio: float | None = None, **rest: Any) -> tuple[Any, ...]:
    """An example."""
    return path, count, ratio, rest


def test_what_fits_is_passed_on_as_it_came() -> None:
    path = Path("a")
    assert example(path)[0] is path
    assert example("a", 4, ratio=2, other="b") == ("a", 4, 2, {"other": "b"})
    assert str(inspect.signature(example)).startswith("(path: 'str | Path', count: 'int' = 3")
    with pytest.raises(TypeError, match="missing a required argument: 'path'"):
        example()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": 3}, "path=3: expected a valid string"),
        ({"path": "a", "count": 4.0}, "count=4.0: expected a valid integer"),
        ({"path": "a", "ratio": "0.3"}, "ratio='0.3': expected a valid number"),
        ({"path": "a", "ratio": True}, "ratio=True: expected a valid number"),
        (
            {"path": list(range(99))},
            "path=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, …: expected a val",
        ),
    ],
)
def test_what_does_not_is_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        example(**arguments)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("path", (3, None, b"bundle")),
        ("engine", (None, ["torch"])),
        ("settings", ({"keep_ratio": 1.0}, "forecast", SCHEDULE)),
        ("speedup", ("3", 0, float("nan"), True)),
        ("steps", ("28", 28.0, 0)),
        ("dtype", ("int8", 16, torch.int8)),
        ("cuda_graphs", ("no", None)),
        ("compiled", ("no", 1)),
    ],
)
def test_load_pipeline(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(SettingsError, match=f"^{name}=.*: expected [^;]*$"):
            load_pipeline(**{"path": "nowhere", "speedup": 2.0 if name == "steps" else None, name: value})


@pytest.mark.parametrize("name", ["fp16", "float16", "torch.float16", torch.float16])
def test_dtypes_by_name(name: Any) -> None:
    assert torch_dtype_of(name) is torch.float16


@pytest.mark.parametrize(
    "call",
    [
        lambda module: CatTransformer.from_bundle(None),  # type: ignore[arg-type]
        lambda module: CatTransformer.from_bundle("a", settings={}),  # type: ignore[arg-type]
        lambda module: CatTransformer.from_bundle("a", compiled="no"),  # type: ignore[arg-type]
        lambda module: CatTransformer.from_model(None),  # type: ignore[arg-type]
        lambda module: CatTransformer.from_model(type(module)),  # type: ignore[arg-type]
        lambda module: CatTransformer.from_model(module, {"keep_ratio": 0.3}),  # type: ignore[arg-type]
        lambda module: CatTransformer.from_model(module, 0.3),  # type: ignore[arg-type]
        lambda module: CatTransformer.from_model(module, SCHEDULE),  # type: ignore[arg-type]
        lambda module: CatTransformer.from_model(module, schedule="28-9.json"),  # type: ignore[arg-type]
        lambda module: CatTransformer.from_model(nn.LSTM(2, 2), "forecast"),  # type: ignore[arg-type]
        lambda module: CatTransformer(module),  # type: ignore[arg-type]
        lambda module: setattr(CatTransformer.from_model(module), "settings", "forecast"),
        lambda module: setattr(CatTransformer.from_model(module), "settings", None),
        lambda module: PruneSettings.tuned(None),  # type: ignore[arg-type]
        lambda module: PruneSettings.preset(["paper"]),  # type: ignore[arg-type]
        lambda module: PruneSettings.from_dict(None),  # type: ignore[arg-type]
        lambda module: PruneSettings.from_dict({1: 2}),  # type: ignore[dict-item]
        lambda module: PruneSettings(schedule={}),
        lambda module: Schedule.load(None),  # type: ignore[arg-type]
        lambda module: SCHEDULE.save(None),  # type: ignore[arg-type]
    ],
)
def test_the_public_functions(call: Callable[[Any], object], make_tiny: Callable[..., Any]) -> None:
    with pytest.raises(SettingsError, match=r"(expected|is not known)"):
        call(make_tiny("sd3"))


@pytest.mark.parametrize(
    "arguments",
    [("6", [0]), (6.0, [0]), (6, None), (6, [0, 1], [1, 2]), (6, [0, 1], {2: [1]}), (6, ["0"]), (6, [0], {None: {}})],
)
def test_a_schedule_of_other_types(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ScheduleError, match=r"; give "):
        Schedule.of(*arguments)


def test_iterators_are_taken_as_tuples() -> None:
    assert PruneSettings(fresh_quotas=iter([0.1, 0.2])).fresh_quotas == (0.1, 0.2)  # type: ignore[arg-type]
    assert Schedule.of(6, iter([0, 1, 3])) == SCHEDULE


@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("hidden_states", None, "a tensor of floating-point numbers, got NoneType"),
        ("hidden_states", [1.0], "a tensor of floating-point numbers, got list"),
        ("hidden_states", torch.ones(2, 4, 8, 8).numpy(), "a tensor of floating-point numbers, got float32"),
        ("hidden_states", torch.ones(2, 4, 8, 8).long(), r"a tensor of floating-point numbers, got torch\.int64"),
        ("timestep", 1000, "a tensor, got int"),
        ("encoder_hidden_states", None, "a tensor, got NoneType"),
        ("skip_layers", "01", "a list of blocks, got '01'"),
        ("skip_layers", [0.5], r"a list of blocks, got \[0\.5\]"),
        ("skip_layers", ["a"], r"a list of blocks, got \['a'\]"),
    ],
)
def test_forward(name: str, value: Any, got: str, make_tiny: Callable[..., Any], pipeline_call: Any) -> None:
    module = make_tiny("sd3")
    arguments: dict[str, Tensor] = pipeline_call(module, batch=2, grid=(4, 4)).arguments
    with pytest.raises(SettingsError, match=f"^{name}: expected {got}"):
        CatTransformer.from_model(module)(**arguments | {name: value})
