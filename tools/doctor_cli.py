"""`cat-doctor`: what this machine can do, what a bundle needs of it, and what to install for the rest."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cat_pruning import console
from cat_pruning.arguments import Parser, path
from cat_pruning.errors import BundleError
from cat_pruning.terminal import say, terminal, waiting
from cat_pruning.tools.findings_table import findings_table

if TYPE_CHECKING:
    from rich.console import Console

    from cat_pruning.tools.doctor import Report
    from cat_pruning.tools.findings import Finding

_EXAMPLES = """\
examples:
  cat-doctor                     what this machine has, which engines run on it, what it can build
  cat-doctor build/sd3-mini      besides, whether it can generate from this bundle, and which plans fit
  cat-doctor --json              the same for a program
exit code:
  0      this machine can generate: from the bundle, or without one by any engine
  1      it cannot
  2      the arguments are wrong, or there is no whole bundle
  70     what nobody foresaw
"""
_TITLES = {
    "machine": "this machine",
    "bundle": "the bundle",
    "engines": "cat-generate --engine",
    "targets": "cat-export --target",
}
_TOPICS = {
    "gpu": "GPU",
    "driver": "driver",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT-RTX",
    "nvrtc": "NVRTC",
}  # of the machine; the others are as one types them


def main(argv: list[str] | None = None) -> int:
    """Entry point of `cat-doctor`."""
    reports: list[Report] = []
    code = console.run("cat-doctor", lambda: reports.append(_doctor(_parser().parse_args(argv))))
    return code or int(not reports[0].can_generate)


def _parser() -> Parser:
    parser = Parser(
        prog="cat-doctor",
        description="Tell what this machine can do for cat-pruning, and what to install for the rest.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=path, nargs="?", help="the directory of a bundle that is to run here")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    return parser


def _doctor(arguments: argparse.Namespace) -> Report:
    status = "Look at this machine …"
    with console.collector_paused(), console.muted() as error, waiting(terminal(file=error), status):
        from cat_pruning.bundle.bundle import Bundle
        from cat_pruning.tools.doctor import examine

        if arguments.bundle:
            _check_no_hub_id(arguments.bundle)
        report = examine(Bundle.open(arguments.bundle) if arguments.bundle else None)
    if arguments.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    else:
        _print(terminal(), report)
    return report


def _check_no_hub_id(bundle: Path) -> None:
    """Say of what is spelt like a checkpoint on the hub that it is not looked at."""
    if os.path.lexists(bundle):  # a Path of a name too long raises
        return
    from cat_pruning.checkpoints.hub import is_hub_id

    if is_hub_id(str(bundle)):
        raise BundleError(
            f"{bundle} is no directory; if it is a checkpoint on the hub: those are not looked at here",
            f"export it, which checks it, and give the bundle: cat-export --model {bundle} --out DIR",
        )


def _print(screen: Console, report: Report) -> None:
    told: set[str] = set()
    for section, title in _TITLES.items():
        findings: tuple[Finding, ...] = getattr(report, section)
        if not findings:
            continue
        say(f"{title} {report.bundle_path}" if section == "bundle" else title, to=screen, style="bold")
        topics = _TOPICS if section == "machine" else {}
        screen.print(findings_table(findings, told, topics))
        screen.print()
    say(_verdict(report), to=screen, style="bold green" if report.can_generate else "bold red")


def _verdict(report: Report) -> str:
    of_what = f" from {report.bundle_path}" if report.bundle_path else ""
    if not report.can_generate:
        return f"This machine cannot generate{of_what or ' images'}."
    return f"This machine can generate{of_what or ' images'}, with the engine {report.engine}."


if __name__ == "__main__":
    sys.exit(main())
