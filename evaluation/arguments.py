"""The command line of `cat-eval`: its options, their defaults, and what can be checked before anything is loaded."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, Final

from cat_pruning.arguments import (
    MOST,
    MOST_PROMPTS,
    MOST_SEEDS,
    MOST_STEPS,
    MOST_WORKERS,
    Parser,
    guidance,
    list_of,
    number,
    path,
    place,
    resolution,
    shown,
    text,
    whole,
)
from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.cluster import Cluster
from cat_pruning.evaluation.former import FORMER_METRICS
from cat_pruning.installation import require
from cat_pruning.names import ENGINES

_EXAMPLES = """\
examples:
  cat-eval build/sd3-mini --guidance-scale 3 --out build/eval                          the miniature, on its own scenes
  cat-eval build/sd3-mini --guidance-scale 3 --out build/quick --quick                 the same in a minute or two
  cat-eval sd3 --prompts PartiPrompts.tsv --steps 28,50 --metrics clip,psnr,ssim --out parti
  cat-eval sd3 --prompts captions.json --limit 500 --metrics clip --methods cat,at-edm --engine torch --out coco
  cat-eval sd3 --prompts PartiPrompts.tsv --ray auto --out parti                       by every GPU of a cluster of Ray
  cat-eval sd3 --quantized sd3-int8 --methods cat,tuned --out eight-bits               both factors, alone and together

The same command started again after an interruption goes on where it was. With other methods, ratios or schedules, or
with more --curve-prompts, it adds them to what --out holds, and runs the first method, ratio and schedule that it is
given then on all prompts, too.
"""
_RAY_ADDRESS: Final = re.compile(r"(ray://)?([\w.-]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}")
# Where an option is not given: with --quick, and without.
_QUICK = {"prompts": "scenes:4", "steps": (28,), "keep_ratio": (0.3,), "curve_prompts": 4, "sheet": 4}
_DEFAULT = {"prompts": "scenes:64", "steps": (28,), "keep_ratio": (0.3,), "curve_prompts": 64, "sheet": 6}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, each with its value; exits with code 2 where argparse refuses one."""
    arguments = _parser().parse_args(argv)
    for name, value in (_QUICK if arguments.quick else _DEFAULT).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def _parser() -> Parser:
    parser = Parser(
        prog="cat-eval",
        description="Compare pruned images with full ones, other methods and fewer steps; write an HTML report.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=place, help="a bundle that cat-export wrote, or its URL, as hf://owner/name")
    parser.add_argument(
        "--quantized",
        type=place,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="one of the same model that cat-export --quantize or --weights-only wrote: its methods are compared with "
        "the first bundle's full run, too; may be given several times",
    )
    parser.add_argument("--out", type=path, required=True, help="directory of the results and of report.html")
    parser.add_argument(
        "--prompts",
        type=text,
        metavar="FILE|scenes:N|rich:N",
        help="a line each, PartiPrompts' .tsv, DrawBench's .csv or COCO's captions .json; or N scenes that the "
        "miniatures were not trained on, rich ones for sd3-mini-256 (default: scenes:64)",
    )
    parser.add_argument("--limit", type=whole(1, MOST), metavar="N", help="the first N prompts only")
    parser.add_argument(
        "--curve-prompts",
        type=whole(1, MOST),
        metavar="N",
        help="prompts of everything but the main comparison, which is the first method (and the forecast), ratio and "
        "schedule against the full run and fewer steps (default: 64)",
    )
    parser.add_argument("--steps", type=list_of(whole(1, MOST_STEPS)), metavar="S,…", help="schedules (default: 28)")
    parser.add_argument("--keep-ratio", type=list_of(number(0, 1)), metavar="R,…", help="in (0, 1] (default: 0.3)")
    parser.add_argument(
        "--full-steps", type=whole(2, MOST_STEPS), metavar="F", help="full steps at the start (default: the bundle's)"
    )
    parser.add_argument(
        "--methods",
        type=list_of(str),
        metavar="M,…",
        help="a policy (cat, noise, cluster, stale, random, ras), alone or with +refresh after it; forecast; tuned, "
        "by a schedule of cat-tune, or tuned-N by that of N full steps; at-edm; fewer full steps by another solver: "
        "multistep (DPM-Solver++), unipc, ab2 (Adams-Bashforth) (default: every policy, cat+refresh, forecast, and "
        "at-edm where model and engine allow it)",
    )
    parser.add_argument("--policies", dest="methods", type=list_of(str), action=_FormerName, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=whole(1, MOST_SEEDS), default=1, help="images of each prompt (default: 1)")
    parser.add_argument(
        "--metrics",
        type=_metrics,
        metavar="M,…",
        help="psnr, ssim, latents, lpips: against the full run; truth: the latents against a converged run, of 200 "
        "steps more; coverage, clip: against the prompt (default: psnr, ssim, latents; coverage where every prompt is "
        "a scene)",
    )
    parser.add_argument(
        "--clip-model", type=text, metavar="ID|DIR", help="of the CLIP score (default: openai/clip-vit-base-patch16)"
    )
    parser.add_argument("--lpips-weights", type=path, metavar="FILE", help="torchvision's AlexNet, for lpips")
    parser.add_argument("--engine", choices=ENGINES, default="auto")
    parser.add_argument(
        "--public-key",
        type=path,
        metavar="FILE",
        help="refuse a bundle that is not signed with this Ed25519 key, a PEM file: see cat-bundle sign",
    )
    parser.add_argument("--guidance-scale", type=guidance, help="default: the pipeline's own")
    parser.add_argument("--resolution", type=resolution, metavar="HxW", help="pixels (default: the bundle's)")
    parser.add_argument("--batch", type=whole(1, MOST_PROMPTS), default=8, help="prompts at once (default: 8)")
    parser.add_argument(
        "--sheet", type=whole(0, MOST_PROMPTS), metavar="N", help="prompts whose images the report shows (default: 6)"
    )
    add_cluster(parser)
    parser.add_argument("--quick", action="store_true", help="four scenes, where nothing else is said")
    parser.add_argument("--force", action="store_true", help="begin anew if --out holds an evaluation")
    return parser


def add_cluster(parser: Parser) -> None:
    """Add the options that spread a tool's prompts over a cluster; `cluster_of` reads them."""
    parser.add_argument(
        "--ray",
        type=_ray_address,
        metavar="ADDRESS",
        help="spread the batches of prompts over a cluster of Ray: auto, HOST:PORT, ray://HOST:PORT, or local for one "
        "of this machine's GPUs (extra ray)",
    )
    parser.add_argument(
        "--ray-workers",
        type=whole(1, MOST_WORKERS),
        metavar="N",
        help="of the cluster, each with the whole model (default: one of each GPU; of each machine if there is none)",
    )


def cluster_of(arguments: argparse.Namespace) -> Cluster | None:
    """What the options say of a cluster; None where the work is done here.

    Raises:
        InstallationError: Ray is not installed.
        SettingsError: workers without a cluster.
    """
    if arguments.ray is None:
        if arguments.ray_workers is not None:
            raise SettingsError("--ray-workers without --ray: they are of a cluster", "give --ray ADDRESS too")
        return None
    require("--ray", "ray")
    return Cluster(address=arguments.ray, workers=arguments.ray_workers)


def _ray_address(argument: str) -> str:
    """The address of a cluster, as an argument."""
    if argument in ("auto", "local") or _RAY_ADDRESS.fullmatch(argument):
        return argument
    raise argparse.ArgumentTypeError(f"{shown(argument)}: expected auto, local, HOST:PORT or ray://HOST:PORT")


class _FormerName(argparse.Action):
    """An option by its former name: `--policies` for `--methods`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Take the value, with a note."""
        sys.stderr.write(f"{parser.prog}: {option} is called --{self.dest}\n")
        setattr(namespace, self.dest, values)


def _metrics(text: str) -> tuple[str, ...]:
    names = list_of(str)(text)
    for former, current in FORMER_METRICS.items():
        if former in names:
            sys.stderr.write(f"cat-eval: --metrics {former} is called {current}\n")
    return tuple(dict.fromkeys(FORMER_METRICS.get(name, name) for name in names))


def check(arguments: argparse.Namespace) -> None:
    """Check what needs no bundle and no prompts.

    Raises:
        InstallationError: as `cluster_of`.
        ServerError: no server answers at --ray.
        SettingsError: a keep ratio that keeps nothing, or two that no file's name tells apart; quantized bundles for
            the engine torch; or as `cluster_of`.
    """
    if (cluster := cluster_of(arguments)) is not None:
        cluster.check()
    if arguments.quantized and arguments.engine == "torch":
        raise SettingsError(
            "--quantized --engine torch: it computes with the checkpoint's weights, which are not quantized",
            "take another engine",
        )
    if 0.0 in arguments.keep_ratio:
        raise SettingsError(
            "--keep-ratio 0: expected numbers in (0, 1]", "for pruned steps that compute nothing, --methods forecast"
        )
    names: dict[str, float] = {}
    for ratio in arguments.keep_ratio:
        if (other := names.setdefault(f"{ratio:g}", ratio)) != ratio:
            raise SettingsError(f"--keep-ratio {other},{ratio}: they differ after the sixth digit only", "give one")
