"""What the command-line tools share: errors as one line and exit code 2, sizes and numbers as people read them."""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO

from cat_pruning.errors import CatError
from cat_pruning.installation import check_platform


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error of the tools."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def run(program: str, command: Callable[[], None], interrupted: str = "nothing was left behind") -> int:
    """Run a tool: 0 when it is done, 2 and one line on standard error when it cannot be, 130 when it is interrupted."""
    # Before torch is imported: between the calls of an engine its threads must sleep, not spin, or on a machine that
    # others use too they wait for one another. A pruned step of sd3-mini took half the time under load.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quiet_libraries()
    try:
        check_platform()
        command()
    except CatError as error:
        sys.stderr.write(f"{program}: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted; {interrupted}\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return 1
    return 0


def quiet_libraries() -> None:
    """Keep the libraries' hints out of a tool's output; `CAT_PRUNING_LOG=DEBUG` shows them all."""
    level = os.environ.get("CAT_PRUNING_LOG")
    if level:
        logging.basicConfig(level=level.upper())
        return
    warnings.simplefilter("ignore")
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
    sink = os.dup(2) if os.environ.get("CAT_PRUNING_LOG") else os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        with open(error, "w", closefd=False) as own:
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


def resolution(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels, as an argument."""
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HEIGHTxWIDTH in pixels, like 1024x768")
    return int(match[1]), int(match[2])


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
