"""How long the package and the tools take to start; `make bench-startup`.

Every case is a process of its own. Rounds are interleaved, so that other work on the machine falls on all cases alike;
the medians of wall and CPU time (user and system, of the whole process with its end) are told. With `--before` the same
is measured of another checkout.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from machine import write_result
from source_tree import ROOT

PROMPT = "a large red circle above a small blue star on a plain black background"
IMPORTS = {
    "import torch": "import torch",
    "import cat_pruning": "import cat_pruning",
    "import cat_pruning.runtime.transformer": "import cat_pruning.runtime.transformer",
    "import torch, then diffusers' pipeline": "import torch; from diffusers import StableDiffusion3Pipeline",
    "the same, and CatTransformer": (
        "import torch; from diffusers import StableDiffusion3Pipeline; from cat_pruning import CatTransformer"
    ),
}


def main() -> None:
    """Measure, print, and write benchmarks/results/startup.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle of sd3-mini")
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="startup", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    trees = {"now": ROOT} | ({"before": arguments.before} if arguments.before else {})
    with tempfile.TemporaryDirectory() as out:
        commands = {tree: cases(root, arguments.bundle.resolve(), Path(out)) for tree, root in trees.items()}
        result = measure(commands, {tree: environment(root) for tree, root in trees.items()}, arguments.rounds)
    print(table(result))  # noqa: T201
    print(write_result(arguments.name, {"rounds": arguments.rounds, "seconds": result}))  # noqa: T201


def cases(root: Path, bundle: Path, out: Path) -> dict[str, list[str]]:
    """The command of every case, by its name, of the checkout at `root`."""
    scripts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    tools = {
        **{f"{name} --help": (name, ["--help"]) for name in sorted(scripts)},
        "cat-doctor": ("cat-doctor", []),
        "cat-doctor BUNDLE": ("cat-doctor", [str(bundle)]),
        "cat-generate": ("cat-generate", [str(bundle), PROMPT, "--guidance-scale", "3", "-o", str(out / "image.png")]),
    }
    commands = {name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}
    for name, (tool, given) in tools.items():
        module, _, function = scripts[tool].partition(":")
        code = f"import sys; from {module} import {function}; sys.exit({function}())"
        commands[name] = [sys.executable, "-c", code, *given]
    return commands


def environment(root: Path) -> dict[str, str]:
    """In which the package is that of the checkout at `root`."""
    command = [sys.executable, str(root / "benchmarks" / "source_tree.py")]
    source = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return os.environ | {"PYTHONPATH": source}


def measure(
    commands: Mapping[str, Mapping[str, list[str]]], environments: Mapping[str, Mapping[str, str]], rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Medians by case, tree and "wall" or "cpu", in seconds; a round before them all fills the disk's caches."""
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(rounds + 1):
        for case in next(iter(commands.values())):
            for tree, of_tree in commands.items():
                seconds = seconds_of(of_tree[case], environments[tree])
                if number:
                    runs.setdefault((case, tree), []).append(seconds)
    medians: dict[str, dict[str, dict[str, float]]] = {}
    for (case, tree), times in runs.items():
        wall, cpu = (statistics.median(each) for each in zip(*times, strict=True))
        medians.setdefault(case, {})[tree] = {"wall": wall, "cpu": cpu}
    return medians


def seconds_of(command: list[str], environ: Mapping[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of one process from its start to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=dict(environ), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode()}")
    return wall, usage.ru_utime + usage.ru_stime


def table(result: dict[str, dict[str, Any]]) -> str:
    """The result as a table in Markdown: seconds, and what they are times an `import torch` of the same tree."""
    torch = result["import torch"]["now"]
    trees = ("before", "now") if "before" in result["import torch"] else ("now",)
    head = [f"{tree}, {kind}" for tree in trees for kind in ("wall", "CPU")]
    lines = [["", *head, "CPU, times import torch"], ["---"] * (len(head) + 2)]
    for case, of_tree in result.items():
        cells = [f"{of_tree[tree][kind]:.2f} s" for tree in trees for kind in ("wall", "cpu")]
        lines.append([case, *cells, f"{of_tree['now']['cpu'] / torch['cpu']:.2f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
