"""Every example runs, in this process and with few steps, and prints what it is there to show."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from cat_pruning import families
from cat_pruning.bundle.bundle import Bundle
from cat_pruning.checkpoints.library_logs import quiet_diffusers
from cat_pruning.exporter import export
from cat_pruning.exporter.export import ExportConfig

EXAMPLES = Path(__file__).parents[1] / "examples"

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one in a folder of its own, with eight full steps and a pruned one, and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    # What an example registers is gone after the test.
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES])

    def run(name: str, steps: int = 9) -> str:
        monkeypatch.setenv("CAT_EXAMPLE_STEPS", str(steps))
        with quiet_diffusers():
            if name.endswith(".ipynb"):
                _run_cells(EXAMPLES / name)
            else:
                runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def _run_cells(path: Path) -> None:
    """The notebook's code, cell by cell, in one namespace."""
    names: dict[str, object] = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec"), names)


@pytest.mark.long
def test_the_drop_in(run: Run) -> None:
    full, pruned = run("01_drop_in.py").splitlines()
    assert full.split()[0] == "full"
    assert pruned.split()[0] == "pruned"
    pictures = [Path("build/examples", name).read_bytes() for name in ("full.png", "pruned.png")]
    assert pictures[0] != pictures[1]


def test_export_and_load(run: Run, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export itself, of the same configuration, is the fixture's: it takes longer than all the rest."""
    configs: list[ExportConfig] = []

    def exported(config: ExportConfig) -> Bundle:
        configs.append(config)
        return Bundle.open(mini_bundle)

    monkeypatch.setattr(export, "export", exported)
    printed = run("02_export_and_load.py")
    assert "sd3-mini/step.onnx" in printed
    assert "a full step is 2.51 times the MACs of a pruned one" in printed
    assert "onnxruntime: build/examples/exported.png" in printed
    (config,) = configs
    assert (config.model, config.text_length, config.out.name) == ("sd3-mini", 48, mini_bundle.name)
    assert Path("build/examples/exported.png").stat().st_size > 1000


@pytest.mark.long
def test_policies(run: Run) -> None:
    rows = [line.split() for line in run("03_compare_policies.py").splitlines()[1:]]
    errors = {" ".join(row[:-5]): float(row[-3]) for row in rows}
    assert list(errors) == [
        *("paper", "refreshed", "forecast", "stale tokens only", "highest noise only", "random tokens")
    ]
    assert all(0 < error < 1 for error in errors.values())
    assert rows[0][-5:-3] == ["8", "30%"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' DPM-Solver, of numpy
def test_schedulers(run: Run) -> None:
    assert run("04_new_scheduler.py", steps=6).split("\n")[:-1] == [
        "        Euler: 6 calls, 6 steps: FFFFpp",
        "         Heun: 11 calls, 6 steps: FFFFpp",
        " DPM-Solver++: 6 calls, 6 steps: FFFFpp",
    ]


@pytest.mark.long
def test_a_family(run: Run) -> None:
    printed = run("05_new_family.py")
    assert "before: ClampedTransformer cannot compute some tokens only" in printed
    assert "keep 1 equals the module itself: True" in printed
    assert "keep 0.3: 76 tokens on the last step" in printed


@pytest.mark.long
def test_the_notebook(run: Run) -> None:
    printed = run("token_map.ipynb", steps=10)
    assert "step  9: pruned  76 of 256 tokens" in printed
    assert Path("build/examples/token_map.png").stat().st_size > 10_000


def test_the_notebook_keeps_no_outputs() -> None:
    for cell in json.loads((EXAMPLES / "token_map.ipynb").read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_every_example_is_tested_and_listed() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    tests, readme = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    assert {name for name in names if name not in tests or f"({name})" not in readme} == set()
