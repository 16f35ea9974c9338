"""A test that is too dear fails the run, unless it is marked. What shared fixtures take is not counted."""

from __future__ import annotations

import cpu_seconds
import pytest

TESTS = """
import subprocess, sys, time
import pytest

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture(scope="module")
def shared():
    burn(0.15)

@pytest.fixture
def own():
    burn(0.15)

def test_cheap(shared):
    time.sleep(0.01)

def test_dear():
    burn(0.15)

def test_with_a_dear_fixture(own):
    pass

def test_with_a_dear_child():
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.15: pass"], check=True)

@pytest.mark.slow
def test_marked():
    burn(0.15)
"""
ARGUMENTS = ("-p", "cpu_seconds")


@pytest.fixture(autouse=True)
def _no_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of installed packages would be imported, and rewritten, for each of the runs."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def tests(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers =\n    slow\n    long")
    return pytester


def too_dear(result: pytest.RunResult) -> list[str]:
    lines = [line.split(" took ")[0] for line in result.outlines if "make it cheaper, or mark it as" in line]
    return [line.rpartition("::")[2] for line in lines]


def test_dear_tests_fail_the_run(tests: pytest.Pytester) -> None:
    result = tests.runpytest(*ARGUMENTS, "--most-cpu-seconds", "0.1")
    result.assert_outcomes(passed=5)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert too_dear(result) == ["test_dear", "test_with_a_dear_fixture", "test_with_a_dear_child"]


def test_what_the_fast_tests_should_leave_out_is_told(tests: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_seconds, "LONG", 0.1)
    tests.makepyfile(test_long=TESTS.replace("mark.slow", "mark.long"))
    result = tests.runpytest(*ARGUMENTS, "--most-cpu-seconds", "20", "test_long.py")
    assert result.ret == pytest.ExitCode.OK
    assert too_dear(result) == ["test_dear", "test_with_a_dear_fixture", "test_with_a_dear_child"]


@pytest.mark.parametrize("limit", [(), ("--most-cpu-seconds", "20")])
def test_without_a_limit_or_within_it_the_run_is_good(tests: pytest.Pytester, limit: tuple[str, ...]) -> None:
    result = tests.runpytest(*ARGUMENTS, *limit, "-k", "dear")
    assert result.ret == pytest.ExitCode.OK
    assert too_dear(result) == []


def test_the_ten_dearest_are_told_and_the_fixtures_apart(pytester: pytest.Pytester) -> None:
    cheap = "".join(f"def test_{number}(shared): pass\n" for number in range(11))
    pytester.makepyfile(f"{TESTS.replace('@pytest.mark.slow', '')}\n{cheap}")
    result = pytester.runpytest(*ARGUMENTS)
    told = {}
    for line in result.outlines:
        seconds, _, name = line.strip().partition("  ")
        if ("::" in name and ", its tests" not in name) or name.startswith("shared, "):
            told[name.rpartition("::")[2]] = float(seconds)
    names = list(told)
    assert len(names) == 11
    assert set(names[:4]) == {"test_dear", "test_with_a_dear_fixture", "test_with_a_dear_child", "test_marked"}
    assert told["shared, a fixture of a module"] == pytest.approx(0.15, abs=0.1)
    assert all(told[name] < 0.1 for name in names[4:10])
