"""Damaged input at random: manifests, configs, settings, schedules, results, forged bundles, until the time is over.

    python benchmarks/fuzz.py --minutes 10

Each is one of tests/fixtures/hostile_inputs.py, what it says changed in one to three places. A tool has to end with
code 2 and one line, a function with an error of ours. Of a bundle that works, forged so that its hashes fit again, a
picture may come out too, and none that is black. Prints how many were tried of each kind, and the smallest failing
ones; exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

sys.path.append(str(Path(__file__).parents[1] / "tests" / "fixtures"))
from hostile_inputs import forged_kinds, kinds
from hostile_json import damaged

from cat_pruning.exporter.export import ExportConfig, export
from cat_pruning.names import Target

ROUND = 15  # of a kind, before the next one's turn


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kinds", help="some of them, commas between (default: all)")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    tried, failed = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as exported:
        forged = forged_kinds(_bundle(Path(exported)))  # before `kinds` puts the tracing off
        end = time.monotonic() + 60 * arguments.minutes
        with kinds(Path(directory)) as found:
            found |= forged
            chosen = arguments.kinds.split(",") if arguments.kinds else [*found]
            while time.monotonic() < end:
                for kind in chosen:
                    fields, check = found[kind]
                    failed[kind] += _try(kind, fields, check, tried)
    for kind in chosen:
        sys.stdout.write(f"{kind:46} {tried[kind]:7} tried, {failed[kind]} failures\n")
    sys.stdout.write(f"{'together':46} {tried.total():7} tried, {failed.total()} failures\n")
    return int(failed.total() > 0)


def _bundle(directory: Path) -> Path:
    """A bundle of the miniature, to forge."""
    config = ExportConfig(model="sd3-mini", out=directory / "bundle", text_length=48, targets=(Target.ONNX,))
    return export(config).path


def _try(kind: str, fields: Any, check: Callable[[Any], None], tried: Counter[str]) -> int:
    """A round of a kind; 1 if one failed, which is told."""

    @seed(random.getrandbits(64))
    @settings(max_examples=ROUND, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged(fields))
    def one(changed: Any) -> None:
        tried[kind] += 1
        check(changed)

    try:
        one()
    except Exception:  # noqa: BLE001  # whatever nobody foresaw
        sys.stdout.write(f"\n{kind}:\n{traceback.format_exc(limit=-8)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
