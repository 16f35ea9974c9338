"""`cat-serve`: bundles behind OpenAI's images API, until SIGTERM."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cat_pruning import console
from cat_pruning.arguments import Parser, number, path, place, whole
from cat_pruning.installation import require
from cat_pruning.names import ENGINES
from cat_pruning.serving.config import ServeConfig
from cat_pruning.terminal import say

API_KEY: Final = "CAT_SERVE_API_KEY"
_EXAMPLES: Final = """\
examples:
  cat-serve build/sd3-mini
  cat-serve build/sd3-mini build/pixart-mini --port 8000 --max-batch 4
  curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' -d '{"prompt": "a blue star"}'
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `cat-serve`."""
    return console.run("cat-serve", lambda: _serve(_parser().parse_args(argv)))


def _parser() -> Parser:
    parser = Parser(
        prog="cat-serve",
        description="Serve bundles that cat-export wrote by OpenAI's images API.",
        epilog=f"{_EXAMPLES}\nWith {API_KEY} in the environment, requests must say `Authorization: Bearer KEY`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "bundle",
        nargs="+",
        type=place,
        help="directories, or URLs, as hf://owner/name; a model's name is the last part",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="default: 8000; 0: any that is free")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="as of cat-generate")
    parser.add_argument(
        "--public-key",
        type=path,
        metavar="FILE",
        help="refuse bundles that are not signed with this key, a PEM file",
    )
    parser.add_argument(
        "--max-batch", type=whole(1, 64), metavar="N", help="most images of a call (default: 1 without a GPU, else 4)"
    )
    parser.add_argument(
        "--max-wait-ms",
        type=number(0, 10_000),
        default=5.0,
        metavar="MS",
        help="how long an image waits for others of its batch (default: 5)",
    )
    parser.add_argument(
        "--queue", type=whole(1, 10_000), default=64, metavar="N", help="most images that wait (default: 64)"
    )
    parser.add_argument(
        "--timeout", type=number(0.001, 86_400), default=300.0, metavar="S", help="of a request (default: 300)"
    )
    parser.add_argument(
        "--grace", type=number(0, 3600), default=30.0, metavar="S", help="after SIGTERM, for requests (default: 30)"
    )
    parser.add_argument(
        "--max-pixels", type=whole(1, 10**9), metavar="N", help="of an image (default: as the bundle was exported)"
    )
    parser.add_argument(
        "--prompt-cache-mb",
        type=whole(0, 10**6),
        default=256,
        metavar="N",
        help="megabytes of encoded prompts that are kept (default: 256)",
    )
    parser.add_argument(
        "--export-triton",
        type=path,
        metavar="DIRECTORY",
        help="serve nothing, but write a model repository of Triton Inference Server with the bundles in it",
    )
    parser.add_argument("--max-steps", type=whole(1, 10_000), default=100, metavar="N", help="default: 100")
    parser.add_argument("--max-prompt-chars", type=whole(1, 100_000), default=4000, metavar="N", help="default: 4000")
    return parser


def config_of(arguments: argparse.Namespace) -> ServeConfig:
    """The configuration that a command line gives."""
    return ServeConfig(
        bundles=tuple(map(Path, arguments.bundle)),
        engine=arguments.engine,
        public_key=arguments.public_key,
        max_batch=arguments.max_batch,
        max_wait_ms=arguments.max_wait_ms,
        queue=arguments.queue,
        timeout_s=arguments.timeout,
        grace_s=arguments.grace,
        max_pixels=arguments.max_pixels,
        max_steps=arguments.max_steps,
        max_prompt_chars=arguments.max_prompt_chars,
        prompt_cache_mb=arguments.prompt_cache_mb,
        api_key=os.environ.get(API_KEY),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; exits with code 2 where argparse refuses one."""
    return _parser().parse_args(argv)


def _serve(arguments: argparse.Namespace) -> None:
    require("cat-serve", "serve")
    config_of(arguments)  # before anything is pulled
    console.check_address_space()
    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.bundle.places import is_url
    from cat_pruning.bundle.pulling import local_copy
    from cat_pruning.bundle.signatures import PublicKey

    key = None if arguments.public_key is None else PublicKey.read(arguments.public_key)
    arguments.bundle = [local_copy(each, key) if is_url(each) else each for each in arguments.bundle]
    config = config_of(arguments)
    for bundle in config.bundles:  # before the seconds that torch takes
        Bundle.open(bundle, key)
    if arguments.export_triton:
        from cat_pruning.serving.triton_repository import export_repository

        for model in export_repository(config, arguments.export_triton):
            say(str(model))
        return
    from cat_pruning.serving.server import serve

    serve(config, arguments.host, arguments.port)


if __name__ == "__main__":
    sys.exit(main())
