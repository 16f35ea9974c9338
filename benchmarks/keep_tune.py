"""The numbers of `cat-tune`, into results/NAME.json, and as a table of the documents; the last line of `make tune`.

python benchmarks/keep_tune.py build/eval/sd3-mini.tune --name tune-sd3-mini-28
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from machine import write_result


def main() -> None:
    """Read tune.json, keep it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of recordings, with tune.json")
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    found = json.loads((arguments.directory / "tune.json").read_text(encoding="utf-8"))
    print(_table(found["outcomes"]))  # noqa: T201
    print(f"written to {write_result(arguments.name, found)}")  # noqa: T201


def _table(outcomes: list[dict[str, Any]]) -> str:
    """A row a budget, a column a method: the latents' error with its interval."""
    full, *others = outcomes
    methods = list(dict.fromkeys(each["method"] for each in others))
    rows = [["full steps", "MACs", *methods], ["---"] * (len(methods) + 2)]
    for budget in dict.fromkeys(each["budget"] for each in others):
        of_budget = {each["method"]: each for each in others if each["budget"] == budget}
        cost = f"1/{full['macs'] / of_budget[methods[0]]['macs']:.2f}"
        rows.append([str(budget), cost, *(_error(of_budget.get(method)) for method in methods)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _error(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "–"
    error = outcome["latents_error"]
    half = f" ± {error['half_width']:.4f}" if error["half_width"] is not None else ""
    return f"{error['mean']:.4f}{half}"


if __name__ == "__main__":
    main()
