"""The commands: each imports its tool and runs it. Ctrl-C is a line from the first moment, and no traceback."""

from __future__ import annotations

import importlib
import sys
from typing import Final

_TOOLS: Final = {
    "cat-bundle": "cat_pruning.tools.bundle_cli",
    "cat-bench-serve": "cat_pruning.serving.load_cli",
    "cat-doctor": "cat_pruning.tools.doctor_cli",
    "cat-eval": "cat_pruning.evaluation.cli",
    "cat-export": "cat_pruning.exporter.cli",
    "cat-generate": "cat_pruning.tools.generate_cli",
    "cat-serve": "cat_pruning.serving.cli",
    "cat-tune": "cat_pruning.tuning.cli",
}


def bundle() -> int:
    """`cat-bundle`."""
    return _run("cat-bundle")


def bench_serve() -> int:
    """`cat-bench-serve`."""
    return _run("cat-bench-serve")


def doctor() -> int:
    """`cat-doctor`."""
    return _run("cat-doctor")


def evaluate() -> int:
    """`cat-eval`."""
    return _run("cat-eval")


def export() -> int:
    """`cat-export`."""
    return _run("cat-export")


def generate() -> int:
    """`cat-generate`."""
    return _run("cat-generate")


def serve() -> int:
    """`cat-serve`."""
    return _run("cat-serve")


def tune() -> int:
    """`cat-tune`."""
    return _run("cat-tune")


def _run(program: str) -> int:
    try:
        main = importlib.import_module(_TOOLS[program]).main
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted; nothing was begun\n")
        return 130
    except ImportError as error:  # of a package that every tool needs
        said = " ".join(str(error).split())
        sys.stderr.write(f"{program}: it is not installed whole ({said}); install it again: pip install cat-pruning\n")
        return 2
    code: int = main()
    return code
