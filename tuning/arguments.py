"""The command line of `cat-tune`: its options, and what can be checked before anything is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

from cat_pruning.arguments import (
    MOST_PROMPTS,
    MOST_STEPS,
    Parser,
    check_output_directory,
    guidance,
    list_of,
    path,
    resolution,
    text,
    whole,
)
from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.arguments import add_cluster, cluster_of
from cat_pruning.names import ENGINES

_EXAMPLES = """\
examples:
  cat-tune build/sd3-mini --guidance-scale 3                          schedules for 2, 3 and 4 times the speed
  cat-tune build/sd3-mini --guidance-scale 3 --full 16,12,9,7,6       for so many full steps of 28
  cat-tune sd3 --prompts my-prompts.txt --measure others.txt          on prompts of your own
  cat-tune sd3 --ray auto                                             by every GPU of a cluster of Ray
  cat-generate build/sd3-mini "…" --guidance-scale 3 --speedup 3      use one

The same command started again after an interruption goes on with the recordings that it has.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; exits with code 2 where argparse refuses one."""
    return _parser().parse_args(argv)


def _parser() -> Parser:
    parser = Parser(
        prog="cat-tune",
        description="Fit schedules to a bundle's model: which steps compute, and what the others are made of. "
        "They go into the bundle.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=path, help="a bundle that cat-export wrote")
    parser.add_argument(
        "--steps", type=whole(3, MOST_STEPS), metavar="N", help="of a run (default: the pipeline's own)"
    )
    parser.add_argument("--speedup", type=list_of(float), metavar="X,…", help="of an image, by MACs (default: 2,3,4)")
    parser.add_argument(
        "--full", type=list_of(whole(2, MOST_STEPS)), metavar="K,…", help="full steps, instead of --speedup"
    )
    parser.add_argument(
        "--prompts",
        type=text,
        default="scenes:24",
        metavar="FILE|scenes:N",
        help="to fit to: a line each, or a table as cat-eval reads it; or N scenes of a miniature (default: scenes:24)",
    )
    parser.add_argument(
        "--measure",
        type=text,
        default="scenes:16",
        metavar="FILE|scenes:N",
        help="prompts to measure on, others than those (default: scenes:16)",
    )
    parser.add_argument(
        "--seed", type=whole(0, 2**62 - 1), default=1_000_000, help="of the first recording (default: 1000000)"
    )
    parser.add_argument("--guidance-scale", type=guidance, help="default: the pipeline's own")
    parser.add_argument(
        "--scheduler", type=text, metavar="CLASS", help="of diffusers, for the pipeline's own (default: that)"
    )
    parser.add_argument("--resolution", type=resolution, metavar="HxW", help="pixels (default: the bundle's)")
    parser.add_argument("--engine", choices=ENGINES, default="auto")
    parser.add_argument("--batch", type=whole(1, MOST_PROMPTS), default=8, help="prompts at once (default: 8)")
    parser.add_argument(
        "--recordings",
        type=path,
        metavar="DIR",
        help="of recordings, tune.json and tune.png (default: beside the bundle, NAME.tune)",
    )
    add_cluster(parser)
    parser.add_argument("--no-peers", action="store_true", help="measure the schedules alone, nothing beside them")
    parser.add_argument("--force", action="store_true", help="record anew")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Check what needs no bundle.

    Raises:
        SettingsError: a number outside its range, or options that do not go together.
        InstallationError: as `cluster_of`.
        ServerError: no server answers at --ray.
        OutputError: --recordings is no directory, or cannot be written.
    """
    if (cluster := cluster_of(arguments)) is not None:
        cluster.check()
    if arguments.speedup is not None and arguments.full is not None:
        raise SettingsError("--speedup and --full are both given", "give one of them")
    for speedup in arguments.speedup or ():
        if not (speedup > 1.0 and math.isfinite(speedup)):
            raise SettingsError(f"--speedup {speedup:g}: expected numbers above 1")
    if arguments.recordings is not None:
        check_output_directory("--recordings", arguments.recordings)


def budgets_of(arguments: argparse.Namespace, steps: int, speed: Callable[[int], float]) -> tuple[int, ...]:
    """The numbers of full steps to tune for, the most first.

    Args:
        arguments: of the command line.
        steps: of a run.
        speed: how many times as fast an image of so many full steps is.

    Raises:
        SettingsError: a budget that leaves fewer than 2 full steps, or nothing to skip.
    """
    if arguments.full is not None:
        budgets = {count: f"--full {count}" for count in arguments.full}
    else:
        budgets = {}
        for speedup in arguments.speedup or (2.0, 3.0, 4.0):
            fast = [count for count in range(2, steps) if speed(count) >= 0.995 * speedup]
            if not fast:
                raise SettingsError(
                    f"--speedup {speedup:g}: of {steps} steps at least 2 are full, which is {speed(2):.3g} times as "
                    "fast",
                    "give a smaller one, or more --steps",
                )
            budgets[max(fast)] = f"--speedup {speedup:g}"
    for count, option in budgets.items():
        if not 2 <= count < steps:
            raise SettingsError(f"{option}: of {steps} steps, expected from 2 to {steps - 1} full ones")
    return tuple(sorted(budgets, reverse=True))
