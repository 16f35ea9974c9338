"""The edge of the command-line tools: whatever goes wrong is one line and an exit code, never a traceback.

0      done
2      a mistake of the user's, or something missing: the line says what to do
70     what nobody foresaw; CAT_PRUNING_LOG=DEBUG shows where
130    interrupted
"""

from __future__ import annotations

import ctypes
import errno
import gc
import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TextIO

from cat_pruning.errors import CatError, SettingsError
from cat_pruning.installation import check_platform
from cat_pruning.terminal import visible

_log = logging.getLogger(__name__)

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How libraries say that there is no memory, in errors of their own and of C's.
_NO_MEMORY: Final = re.compile(
    r"bad_alloc|can(?:no|')t allocate memory|out of memory|failed to (?:allocate memory|map segment)|start new thread",
    re.IGNORECASE,
)
_LONGEST: Final = 600  # characters of a line about what nobody foresaw
_LIBRARIES_BYTES: Final = 1_300_000_000  # VmPeak after their import, torch 2.13 for processors
_LESS_MEMORY: Final = "give it more, or do less at once: smaller images, fewer prompts, a smaller dtype"


def run(program: str, command: Callable[[], None], interrupted: str = "nothing was left behind") -> int:
    """Run a tool, and tell what goes wrong in one line on standard error.

    Args:
        program: its name.
        command: what it does, the reading of its arguments included.
        interrupted: what an interruption leaves behind.

    Returns:
        The exit code: see the module. A reader that goes away, as `head` does, is code 1 and no line.

    Raises:
        SystemExit: of argparse.
    """
    _mend_streams()
    try:
        # Before torch is imported: between the calls of an engine its threads must sleep, not spin, or on a machine
        # that others use too they wait for one another. A pruned step of sd3-mini took half the time under load.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        quiet_libraries()
        check_platform()
        _check_affinity()
        try:
            command()
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # what cannot be written is told here, not at the process's end
    except CatError as error:
        _log.debug("%s was ended by this error", program, exc_info=error)
        return _fail(program, str(error), 2)
    except KeyboardInterrupt:
        return _fail(program, f"interrupted; {interrupted}", 130)
    except BrokenPipeError:
        return 1
    except Exception as error:  # noqa: BLE001  # the edge
        _log.debug("%s was ended by this error", program, exc_info=error)
        return _fail(program, *_foreseen(error))
    finally:
        _let_go()
    return 0


def _foreseen(error: Exception) -> tuple[str, int]:
    """What is said of an error that is none of ours, and the exit code."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    said = " ".join(said.split())[:_LONGEST]
    number = error.errno if isinstance(error, OSError) else None
    if is_lack_of_memory(error):
        return f"there is not enough memory ({said}){_memory_limit()}; {_LESS_MEMORY}", 2
    if number in _FULL:
        return f"there is no room for what is written ({said}); make room", 2
    if library := _failed_import(error):
        return (
            f"{library} cannot be imported ({said}); look at the environment's variables that it reads, or install it "
            "again; CAT_PRUNING_LOG=DEBUG before the command shows where",
            2,
        )
    return f"unforeseen: {said}; CAT_PRUNING_LOG=DEBUG before the command shows where; please report it", 70


def _failed_import(error: Exception) -> str | None:
    """The library that an error is of, if it was raised while that was imported; None of our own errors."""
    for frame in reversed([frame for frame, _ in traceback.walk_tb(error.__traceback__)]):
        module = str(frame.f_globals.get("__name__"))
        if module.startswith("cat_pruning."):
            return None
        if frame.f_code.co_name == "<module>":  # the top level of a file
            return module.split(".")[0]
    return None


def is_lack_of_memory(error: Exception) -> bool:
    """Whether an error, of whatever library, says that there is no memory."""
    number = error.errno if isinstance(error, OSError) else None
    return isinstance(error, MemoryError) or number == errno.ENOMEM or _NO_MEMORY.search(str(error)) is not None


def _check_affinity() -> None:
    """That GNU's OpenMP, which torch computes with, can read a variable over which it would wait without end.

    Raises:
        SettingsError: it cannot.
    """
    name = "GOMP_CPU_AFFINITY"
    value = os.environ.get(name, "")
    if not re.fullmatch(r"\s*([0-9]+(-[0-9]+(:[0-9]+)?)?[\s,]*)*", value):
        raise SettingsError(f"{name}={value!r}: expected numbers of processors, as 0-3 5", "mend it, or unset it")


def check_address_space() -> None:
    """Check that the process may map what the libraries alone take, or they fail in C, without an error.

    Raises:
        SettingsError: it may not.
    """
    limit = _address_space()
    if limit is not None and limit < _LIBRARIES_BYTES:
        raise SettingsError(
            f"the process is limited to {file_size(limit)} (ulimit -v), and torch, ONNX Runtime and diffusers alone "
            f"take {file_size(_LIBRARIES_BYTES)} of address space",
            "raise the limit",
        )


def _memory_limit() -> str:
    limit = _address_space()
    return "" if limit is None else f": the process is limited to {file_size(limit)} (ulimit -v)"


def _address_space() -> int | None:
    """The bytes that the process may map; None where there is no limit."""
    import resource  # which other platforms lack, and they are to be told so

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _fail(program: str, said: str, code: int) -> int:
    with suppress(OSError):  # nobody reads it
        sys.stderr.write(f"{program}: {visible(' '.join(said.split()))}\n")
    return code


def _mend_streams() -> None:
    """Make standard streams that are closed lead nowhere, and let those that cannot write a character write another."""
    for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else it is a test's or a notebook's
            stream.reconfigure(errors=_encoding_errors(stream))


def _encoding_errors(stream: TextIO) -> str:
    """In UTF-8 the bytes of a path that is none come out as they are; elsewhere what is missing is a question mark."""
    return "surrogateescape" if stream.encoding.lower().replace("-", "") == "utf8" else "replace"


def _let_go() -> None:
    """Drop what cannot be written, or Python complains of it at the end of the process."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


_LEVELS: Final = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")  # libraries may define more


def quiet_libraries() -> None:
    """Keep the libraries' hints out of a tool's output; `CAT_PRUNING_LOG=DEBUG` shows them all.

    Raises:
        SettingsError: that variable names no level.
    """
    level = os.environ.get("CAT_PRUNING_LOG")
    if level:
        if level.upper() not in _LEVELS:
            raise SettingsError(f"CAT_PRUNING_LOG={level!r}: expected {', '.join(_LEVELS)}")
        logging.basicConfig(level=level.upper())
        return
    warnings.simplefilter("ignore")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # read when they are imported
        os.environ.setdefault(name, "error")
    for name in ("diffusers", "transformers", "torch", "onnxscript", "onnx_ir", "matplotlib", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Load without Python's garbage collector, which looks through all that libraries define, and finds no garbage.

    What was loaded meanwhile is not looked through afterwards either, not even at the end of the process.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def muted() -> Iterator[TextIO]:
    """Keep what libraries print, in C too, out of a tool's own output; with `CAT_PRUNING_LOG` it goes to the errors.

    Yields:
        The standard error as it was, for the tool itself.
    """
    _flush()
    output, error = os.dup(1), os.dup(2)
    encoding, errors = sys.stderr.encoding, sys.stderr.errors
    sink = os.dup(2) if os.environ.get("CAT_PRUNING_LOG") else os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        with open(error, "w", closefd=False, encoding=encoding, errors=errors) as own:
            yield own
    finally:
        _flush()
        os.dup2(output, 1)
        os.dup2(error, 2)
        for descriptor in (output, error, sink):
            os.close(descriptor)


def _flush() -> None:
    """Write what Python and C hold back, so that it comes out where it was printed for."""
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(OSError, AttributeError, TypeError):  # where the process itself is no library
        ctypes.CDLL(None).fflush(None)


def file_size(num_bytes: int) -> str:
    """A number of bytes for people: 32.0 MB, 4.11 GB."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def macs(count: float) -> str:
    """Multiply-accumulates for people: 1.594 G, 6.012 T."""
    return f"{count / 1e12:.3f} T" if count >= 1e12 else f"{count / 1e9:.3f} G"
