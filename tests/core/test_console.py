from __future__ import annotations

import errno
import gc
import importlib
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cat_pruning import console
from cat_pruning.console import collector_paused
from cat_pruning.errors import SettingsError


@pytest.fixture
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_thawed")
def test_the_collector_rests_while_libraries_load() -> None:
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def failing(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SettingsError("a\nproblem", "a remedy"), 2, "a problem; a remedy"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was left behind"),
        (KeyError("x"), 70, "unforeseen: KeyError: 'x'; CAT_PRUNING_LOG=DEBUG before the command shows where"),
        (RuntimeError("one\n  two"), 70, "unforeseen: RuntimeError: one two; CAT"),
        (RecursionError(), 70, "unforeseen: RecursionError; CAT"),
        (OSError(errno.EIO, "broken", "disk"), 70, "unforeseen: OSError: [Errno 5] broken: 'disk'; CAT"),
        (OSError(errno.ENOSPC, "No space"), 2, "there is no room for what is written (OSError: [Errno 28] No space)"),
        (MemoryError(), 2, "there is not enough memory (MemoryError)"),
        (OSError(errno.ENOMEM, "no"), 2, "there is not enough memory (OSError: [Errno 12] no)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "there is not enough memory (Run"),
        (RuntimeError("std::bad_alloc"), 2, "there is not enough memory"),
        (ImportError("x.so: failed to map segment from shared object"), 2, "there is not enough memory"),
    ],
)
def test_an_error_is_a_line_and_a_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    assert console.run("cat-x", failing(error)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"cat-x: {said}")
    assert captured.err.count("\n") == 1


def test_a_long_error_is_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run("cat-x", failing(ValueError("9" * 10**6))) == 70
    assert len(capsys.readouterr().err) < 1000


def test_the_log_shows_where(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAT_PRUNING_LOG", "debug")
    caplog.set_level(logging.DEBUG)
    assert console.run("cat-x", failing(KeyError("x"))) == 70
    assert "in command" in caplog.text
    assert "Traceback" in caplog.text
    assert "Traceback" not in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("level", ["foo", "7", "NOTSET", " "])
def test_a_log_level_that_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    monkeypatch.setenv("CAT_PRUNING_LOG", level)
    assert console.run("cat-x", lambda: None) == 2
    error = capsys.readouterr().err
    assert error == f"cat-x: CAT_PRUNING_LOG={level!r}: expected CRITICAL, ERROR, WARNING, INFO, DEBUG\n"


@pytest.mark.parametrize("value", ["x", "1:2", "0,x"])
def test_an_affinity_over_which_openmp_waits_without_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("GOMP_CPU_AFFINITY", value)
    assert console.run("cat-test", lambda: None) == 2
    assert f"GOMP_CPU_AFFINITY='{value}': expected numbers of processors" in capsys.readouterr().err
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0-1:1 0,0")
    assert console.run("cat-test", lambda: None) == 0


def test_a_library_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch cannot with TORCH_LOGS=x. What our own code raises, nobody foresaw."""
    (tmp_path / "some_library").mkdir()
    (tmp_path / "some_library" / "__init__.py").write_text("from some_library import settings")
    (tmp_path / "some_library" / "settings.py").write_text("def read(): return int('x')\nread()")
    monkeypatch.syspath_prepend(tmp_path)
    assert console.run("cat-test", lambda: importlib.import_module("some_library") and None) == 2
    assert "some_library cannot be imported (ValueError: invalid literal" in capsys.readouterr().err
    assert console.run("cat-test", lambda: int("x") and None) == 70


def test_too_small_an_address_space(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    console.check_address_space()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (700_000_000, -1))
    assert console.run("cat-x", console.check_address_space) == 2
    assert "limited to 700.0 MB (ulimit -v), and torch, ONNX Runtime and diff" in capsys.readouterr().err
    assert console.run("cat-x", failing(MemoryError())) == 2
    assert "(MemoryError): the process is limited to 700.0 MB (ulimit -v); give it more" in capsys.readouterr().err


# ------------------------------------------------------------------ streams, in processes of their own

PROGRAM = """
import sys
from cat_pruning import arguments, console

def command():
    arguments.Parser(prog="cat-x", description="gr\\u00f6\\u00dfer " * 2000).parse_args(sys.argv[2:])
    print("gr\\u00f6\\u00dfer \\u00d7\\udcff " * int(sys.argv[1]))

sys.exit(console.run("cat-x", command))
"""


def shell(redirection: str, *options: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = f'"$0" -c "$1" "${{@:2}}" {redirection}'
    return subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}", sys.executable, PROGRAM, *options],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
        check=False,
    )


NO_ROOM = b"cat-x: there is no room for what is written (OSError: [Errno 28] No space left on device); make room\n"


@pytest.mark.parametrize(
    ("redirection", "options", "code", "error"),
    [
        ("> /dev/full", ["1"], 2, NO_ROOM),
        ("> /dev/full", ["9999"], 2, NO_ROOM),
        ("> /dev/full", ["1", "--help"], 2, NO_ROOM),
        ("| true", ["99999"], 1, b""),
        (">&-", ["1"], 0, b""),
        (">&- 2>&-", ["1", "--bad"], 2, b""),
        ("<&- >&- 2>&-", ["1"], 0, b""),
        ("2> /dev/full", ["1", "--bad"], 2, b""),
    ],
)
def test_streams_that_are_full_or_closed(redirection: str, options: list[str], code: int, error: bytes) -> None:
    found = shell(redirection, *options)
    assert (found.returncode, found.stderr) == (code, error)


def test_what_a_stream_cannot_say_is_a_question_mark() -> None:
    assert shell("", "1").stdout == "größer ×".encode() + b"\xff \n"
    assert shell("", "1", PYTHONIOENCODING="ascii").stdout == b"gr??er ?? \n"
    plain = shell("", "1", "grö", PYTHONIOENCODING="", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")
    assert plain.returncode == 2
    assert plain.stderr == b"cat-x: unrecognized arguments: gr??; see cat-x --help\n"


def test_a_program_that_imports_it_sees_no_change(tmp_path: Path) -> None:
    """Streams that are not text files, as in a notebook, are left alone."""
    program = PROGRAM.replace("sys.exit", "import io\nsys.stdout = io.StringIO()\nsys.exit")
    found = subprocess.run([sys.executable, "-c", program, "1"], capture_output=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, b"", b"")
