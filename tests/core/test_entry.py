from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest

from cat_pruning import entry

COMMANDS = list(entry._TOOLS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_its_tool(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = entry_points(group="console_scripts", name=command)
    imported: list[str] = []

    def importer(name: str) -> Any:
        imported.append(name)
        return SimpleNamespace(main=lambda: 7)

    run = script.load()
    monkeypatch.setattr(importlib, "import_module", importer)
    assert run() == 7
    assert imported == [entry._TOOLS[command]]
    monkeypatch.undo()
    assert callable(importlib.import_module(imported[0]).main)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interruption_while_a_tool_is_imported(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (script,) = entry_points(group="console_scripts", name=command)
    run = script.load()

    def interrupted(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert run() == 130
    assert capsys.readouterr().err == f"{command}: interrupted; nothing was begun\n"


def test_an_installation_that_is_not_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'rich'")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert entry.generate() == 2
    said = "cat-generate: it is not installed whole (No module named 'rich'); install it again: pip install cat-pruning"
    assert capsys.readouterr().err == f"{said}\n"
