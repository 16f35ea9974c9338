"""The command line of `cat-generate`: its options, what is checked before anything is loaded, what is written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cat_pruning.arguments import (
    MOST_STEPS,
    Parser,
    check_outputs,
    guidance,
    number,
    path,
    place,
    resolution,
    text,
    whole,
)
from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.installation import require
from cat_pruning.names import ENGINES
from cat_pruning.settings import Preset, Reuse
from cat_pruning.tools.image_files import ENDINGS

SETTINGS = ("keep_ratio", "full_steps", "refresh_every", "reuse")
_EXAMPLES = """\
examples:
  cat-generate build/sd3-mini "a large red circle above a small blue star on a plain black background" -o out.png
  cat-generate build/sd3-mini "…" -o out.png --compare --token-map         out.comparison.png, out.token_map.png
  cat-generate build/sd3-mini "…" -o out.png --preset forecast             nearest to the full run's picture on sd3-mini
  cat-generate build/sd3-mini "…" -o out.png --speedup 3                   by a schedule that cat-tune made
  cat-generate build/sd3-mini "…" "…" -o out.png --keep-ratio 0.5          two prompts, one batch: out-0.png, out-1.png
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; exits with code 2 where argparse refuses one."""
    return _parser().parse_args(argv)


def _parser() -> Parser:
    parser = Parser(
        prog="cat-generate",
        description="Generate images from a bundle that cat-export wrote, computing only the tokens worth computing.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=place, help="the bundle's directory, or a URL, as hf://owner/name")
    parser.add_argument("prompt", nargs="+", type=text, help="one or more prompts, generated as one batch")
    parser.add_argument(
        "-o",
        "--out",
        type=path,
        default=Path("out.png"),
        help=f"the image, in the format of its ending: {', '.join(ENDINGS)} (default: out.png)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="default: the bundle's plans if there are some for this machine's GPU, else ONNX Runtime",
    )
    parser.add_argument(
        "--public-key",
        type=path,
        metavar="FILE",
        help="refuse a bundle that is not signed with this Ed25519 key, a PEM file: see cat-bundle sign",
    )
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel of a step by itself")
    parser.add_argument(
        "--steps",
        type=whole(1, MOST_STEPS),
        help="sampling steps (default: the pipeline's own)",
    )
    parser.add_argument("--guidance-scale", type=guidance, help="default: the pipeline's own")
    parser.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=0,
        help="of the first prompt; the next ones count on (default: 0)",
    )
    parser.add_argument("--resolution", type=resolution, metavar="HxW", help="pixels (default: the bundle's first)")
    parser.add_argument(
        "--speedup", type=float, metavar="X", help="so many times as fast, by a schedule of the bundle: see cat-tune"
    )
    parser.add_argument(
        "--preset",
        choices=[*map(str, Preset)],  # argparse shows their repr
        help="settings that have a name; the next four options change them (default: the bundle's settings)",
    )
    parser.add_argument(
        "--keep-ratio",
        type=number(0, 1),
        metavar="R",
        help="tokens of a pruned step, in [0, 1] (default: the bundle's)",
    )
    parser.add_argument(
        "--full-steps",
        type=whole(2, MOST_STEPS),
        metavar="F",
        help="full steps at the start, >= 2 (default: the bundle's)",
    )
    parser.add_argument(
        "--refresh-every",
        type=whole(0, MOST_STEPS),
        metavar="K",
        help="every K-th step after them is full too, 0: none (default: the bundle's)",
    )
    parser.add_argument(
        "--reuse", choices=[*map(str, Reuse)], help="what the other tokens contribute (default: the bundle's)"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also generate without pruning, same seed; print and draw both"
    )
    parser.add_argument("--token-map", action="store_true", help="draw which tokens every pruned step computed")
    parser.add_argument("--timing", action="store_true", help="print how long the prompts, the steps and the VAE took")
    parser.add_argument(
        "--offload",
        choices=["text"],
        help="let go of the text encoders while the steps are computed: for bundles of cat-export --components",
    )
    parser.add_argument("--summary", type=path, metavar="FILE", help="with --compare: write the numbers as JSON")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Check what needs no bundle, before the seconds that torch takes to import.

    Raises:
        SettingsError: options that do not go together, an empty prompt, or an ending that is no picture's.
        OutputError: a file that cannot be written.
        InstallationError: what a picture needs is not installed.
    """
    if any(not prompt.strip() for prompt in arguments.prompt):
        raise SettingsError("an empty prompt", "say what to draw")
    if arguments.speedup is not None:
        if not arguments.speedup >= 1.0:
            raise SettingsError(f"--speedup {arguments.speedup:g}: expected a number >= 1")
        if given := [name for name in ("preset", *SETTINGS) if getattr(arguments, name) is not None]:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise SettingsError(f"--speedup goes with no {options}: the schedule says what each step computes")
    if arguments.out.suffix.lower() not in ENDINGS:
        raise SettingsError(f"--out {arguments.out}: expected a name that ends in {', '.join(ENDINGS)}")
    if not arguments.out.parent.is_dir():
        raise OutputError(
            f"--out {arguments.out}: the directory {arguments.out.parent} does not exist", "make it first"
        )
    if arguments.summary is not None and not arguments.compare:
        raise SettingsError("--summary needs --compare, which measures what it holds")
    if arguments.compare:
        require("--compare", "export", "pictures")
    if arguments.token_map:
        require("--token-map", "pictures")
    check_outputs(outputs_of(arguments))


def outputs_of(arguments: argparse.Namespace) -> list[tuple[str, Path]]:
    """The files that are written, each with the option that it is of."""
    files = images_of(arguments)
    files += [beside(arguments.out, ".comparison.png")] if arguments.compare else []
    files += [beside(arguments.out, ".token_map.png")] if arguments.token_map else []
    outputs = [("--out", file) for file in files]
    return outputs + ([("--summary", arguments.summary)] if arguments.summary is not None else [])


def images_of(arguments: argparse.Namespace) -> list[Path]:
    """The files of the images, in the order of their prompts."""
    out, count = arguments.out, len(arguments.prompt)
    return [out] if count == 1 else [beside(out, f"-{index}{out.suffix}") for index in range(count)]


def beside(out: Path, ending: str) -> Path:
    """The file beside an image, of its name but for the ending."""
    return out.with_name(out.stem + ending)
