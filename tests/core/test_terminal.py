from __future__ import annotations

import io
import os

import pytest
from rich.console import Console
from rich.table import Table

from cat_pruning.terminal import progress, say, terminal, waiting

PATH = "/tmp/[red]a[/]/:smile:/" + "long/" * 40 + "[/nothing]"


@pytest.fixture(autouse=True)
def _no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def test_brackets_are_no_markup_and_lines_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    say(PATH)
    table = Table()
    table.add_column("[b]file", overflow="fold")
    table.add_row(PATH)
    terminal().print(table)
    terminal().print(f"{PATH} 12 {PATH}")
    found = capsys.readouterr().out.splitlines()
    assert found[0] == PATH
    assert next(line for line in found[1:] if PATH in line).split()[1] == PATH
    assert any("[b]file" in line for line in found)
    assert found[-1] == f"{PATH} 12 {PATH}"


def test_what_a_terminal_obeys_is_spelt(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[2Jb\x9b31mc\u2066\x7f größer 👩\u200d👧.")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\x9b31mc\\u2066\\x7f größer 👩\u200d👧.\n"


def test_a_title_with_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    screen = terminal(stderr=True)
    with waiting(screen, PATH) as status:
        status.update(f"[/]{PATH}")
    with progress(screen) as bar:
        bar.update(bar.add_task("images", total=1), advance=1, description="[/]cat-[28]")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[/]cat-[28]" in captured.err


def test_columns_are_taken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    terminal().print("word " * 20)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 30


def test_a_terminal_breaks_a_path_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is copied in one piece."""
    file = io.StringIO()
    say(PATH, to=Console(file=file, force_terminal=True, width=80, color_system=None))
    assert file.getvalue() == f"{PATH}{os.linesep}"
