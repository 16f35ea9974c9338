"""Damaged input at random: manifests, configs, settings, schedules, results, until the time is over.

    python benchmarks/fuzz.py --minutes 10

Each is one of tests/fixtures/hostile_inputs.py, what it says changed in one to three places. A tool has to end with
code 2 and one line, a function with an error of ours. Prints how many were tried of each kind, and the smallest failing
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
from hostile_inputs import kinds
from hostile_json import damaged

ROUND = 15  # of a kind, before the next one's turn


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kinds", help="some of them, commas between (default: all)")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    tried, failed = Counter[str](), Counter[str]()
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as directory, kinds(Path(directory)) as found:
        chosen = arguments.kinds.split(",") if arguments.kinds else [*found]
        while time.monotonic() < end:
            for kind in chosen:
                fields, check = found[kind]
                failed[kind] += _try(kind, fields, check, tried)
    for kind in chosen:
        sys.stdout.write(f"{kind:34} {tried[kind]:7} tried, {failed[kind]} failures\n")
    sys.stdout.write(f"{'together':34} {tried.total():7} tried, {failed.total()} failures\n")
    return int(failed.total() > 0)


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
