"""The command line of `cat-bundle`: its commands and their options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cat_pruning.arguments import Parser, path, place, text

_EXAMPLES = """\
examples:
  cat-bundle inspect build/sd3-mini                    its parts and their sizes, plans by GPU and version, schedules
  cat-bundle verify build/sd3-mini                     every check of loading, on every file
  cat-bundle prune sd3 --plans 'tensorrt-10.*'         drop the plans of an older version
  cat-bundle sign sd3 --key private.pem                then cat-generate sd3 … --public-key public.pem
  cat-bundle diff sd3 sd3-tuned                        settings, weights, parts, plans, schedules
  cat-bundle push sd3 s3://bucket/sd3                  files that are there already are not sent again
  cat-bundle pull hf://owner/name sd3                  or cat-generate hf://owner/name "…"
exit code:
  0      done; verify: every check holds; diff: nothing differs
  1      verify: one does not hold; diff: something differs
  2      the arguments are wrong, or there is no whole bundle
  70     what nobody foresaw
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; exits with code 2 where argparse refuses one."""
    return _parser().parse_args(argv)


def _parser() -> Parser:
    made = Parser(
        prog="cat-bundle",
        description="Look after bundles that cat-export wrote.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, says: str, *, anywhere: bool = False) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=says, description=says[0].upper() + says[1:] + ".")
        of = "the bundle's URL or directory" if anywhere else "the bundle's directory"
        added.add_argument("bundle", type=place if anywhere else path, help=of)
        return added

    inspect = command("inspect", "tell what is in a bundle")
    verify = command("verify", "read every file and check that it is what was exported")
    prune = command("prune", "drop plans and schedules, all that are named or none, and what a killed change left")
    prune.add_argument(
        "--plans",
        action="append",
        type=text,
        metavar="NAME",
        help="a set's name, as inspect tells it, a pattern of names, or tensorrt, tensorrt_rtx; repeatable",
    )
    prune.add_argument(
        "--schedules", action="append", type=text, metavar="NAME", help="a name, as 28-9, or a pattern; repeatable"
    )
    diff = command("diff", "compare two bundles")
    diff.add_argument("other", type=path, help="the other bundle's directory")
    verify.add_argument("--public-key", type=path, metavar="FILE", help="that it must be signed with, a PEM file")
    sign = command("sign", "verify a bundle and sign its manifest, which has the hash of every file")
    sign.add_argument("--key", type=path, required=True, metavar="FILE", help="a private Ed25519 key, a PEM file")
    push = command("push", "copy a bundle to a directory, to S3 and the like, or to the hub")
    push.add_argument("to", type=place, metavar="URL", help="s3://bucket/sd3, hf://owner/name, or a directory")
    pull = command("pull", "copy a bundle from elsewhere, hashed while it comes in, whole or not at all", anywhere=True)
    pull.add_argument("out", type=path, help="the directory that it is to have here")
    pull.add_argument("--public-key", type=path, metavar="FILE", help="that it must be signed with, a PEM file")
    for each in (push, pull):
        each.add_argument("--force", action="store_true", help="replace a bundle that is there")
    for each in (inspect, verify, prune, diff):
        each.add_argument("--json", action="store_true", help="the same as JSON")
    return made
