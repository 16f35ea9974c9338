"""`cat-bench-serve`: what a server of images bears: requests at random times, at one rate after another."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from rich.table import Table

from cat_pruning import console
from cat_pruning.arguments import (
    MOST,
    MOST_STEPS,
    Parser,
    check_outputs,
    guidance,
    list_of,
    number,
    path,
    resolution,
    shown,
    text,
    whole,
)
from cat_pruning.errors import OutputError, ServerError, SettingsError
from cat_pruning.installation import require
from cat_pruning.terminal import progress, say, terminal

if TYPE_CHECKING:
    from cat_pruning.serving.load import Answer, LoadConfig
    from cat_pruning.serving.load_summary import RateSummary

_EXAMPLES = """\
examples:
  cat-bench-serve http://127.0.0.1:8000 --rate 0.5,1,2 --requests 100 --picture load.png
  cat-bench-serve http://127.0.0.1:8000 --size 128x128,96x160 --speedup 3 --json load.json
  cat-bench-serve https://example.org/v1 --model NAME --body '{"quality": "low"}' --key-variable MY_API_KEY
"""
_PROMPTS: Final = (
    "a large red circle above a small blue star on a plain black background",
    "a small green triangle left of a large white square on a plain navy background",
    "a large yellow star below a small purple cross on a plain gray background",
    "a small orange square right of a large blue circle on a plain white background",
)
_ENDINGS: Final = (".png", ".svg", ".pdf", ".jpg")
_MOST_REQUESTS: Final = 1_000_000
_MOST_IMAGES: Final = 1000  # of a request


def main(argv: list[str] | None = None) -> int:
    """Entry point of `cat-bench-serve`."""
    return console.run(
        "cat-bench-serve", lambda: _bench(_parser().parse_args(argv)), "rates that were done are in --json"
    )


def _parser() -> Parser:
    parser = Parser(
        prog="cat-bench-serve",
        description="Send requests for images to a server with OpenAI's API at random times (a Poisson process), "
        "however long the earlier ones take, and tell throughput, latencies and refusals.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("address", type=_address, help="of the server, of its API (…/v1), or of …/images/generations")
    load = parser.add_argument_group("the load")
    load.add_argument(
        "--rate",
        type=list_of(number(0.001, 10_000)),
        default=(1.0,),
        metavar="R,…",
        help="requests per second, each rate measured by itself (default: 1)",
    )
    load.add_argument(
        "--requests", type=whole(1, _MOST_REQUESTS), default=100, metavar="N", help="of each rate (default: 100)"
    )
    load.add_argument("--warm-up", type=whole(0, 1000), default=1, metavar="N", help="uncounted ones (default: 1)")
    load.add_argument(
        "--timeout", type=number(0.001, 86_400), default=600.0, metavar="SECONDS", help="of a request (default: 600)"
    )
    load.add_argument("--draws", type=whole(0, MOST), default=0, metavar="SEED", help="of the times (default: 0)")
    request = parser.add_argument_group("each request; without a value the server decides")
    request.add_argument(
        "--prompt", type=text, action="append", metavar="TEXT", help="one of several is drawn (default: four scenes)"
    )
    request.add_argument("--size", type=list_of(_size), default=(), metavar="WIDTHxHEIGHT,…", help="one is drawn")
    request.add_argument("--model", type=text)
    request.add_argument("--n", type=whole(1, _MOST_IMAGES), help="images of a request")
    request.add_argument(
        "--body", type=_json_object, default={}, metavar="JSON", help='other fields: \'{"quality": "low"}\''
    )
    request.add_argument("--key-variable", type=text, metavar="NAME", help="the environment variable of the API key")
    ours = parser.add_argument_group("each request to cat-serve, besides")
    ours.add_argument("--steps", type=whole(1, MOST_STEPS), help="sent as num_inference_steps")
    ours.add_argument("--guidance-scale", type=guidance)
    ours.add_argument("--speedup", type=number(1, 1000))
    ours.add_argument("--preset", type=text)
    ours.add_argument("--seed", type=whole(0, MOST), help="of the first request; the next one's is one more")
    results = parser.add_argument_group("results")
    results.add_argument("--json", type=path, metavar="FILE", help="all of it, every request's latency too")
    results.add_argument("--picture", type=path, metavar="FILE", help=f"drawn, as {', '.join(_ENDINGS)}")
    return parser


def _address(argument: str) -> str:
    address = text(argument)
    try:
        parts = urlsplit(address)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known or any(character.isspace() for character in address):
        raise argparse.ArgumentTypeError(f"{shown(argument)}: expected an address like http://127.0.0.1:8000")
    return address


def _size(argument: str) -> str:
    """WIDTHxHEIGHT, as OpenAI's API has it."""
    try:
        width, height = resolution(argument)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{shown(argument)}: expected WIDTHxHEIGHT in pixels") from None
    return f"{width}x{height}"


def _json_object(argument: str) -> dict[str, Any]:
    try:
        content = json.loads(text(argument))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f'{shown(argument)}: expected a JSON object, like \'{{"quality": "low"}}\'')
    return content


def _bench(arguments: argparse.Namespace) -> None:
    key = _key(arguments.key_variable)
    _check_outputs(arguments)
    require("cat-bench-serve", "serve")
    from cat_pruning.serving.load import warm_up
    from cat_pruning.serving.load_summary import draw, summarise, write_json

    console.quiet_libraries()
    config = _config(arguments)
    asyncio.run(warm_up(config, key))
    measured: list[tuple[RateSummary, Sequence[Answer]]] = []
    for rate in config.rates:
        answers = _measure(config, rate, key)
        measured.append((summarise(rate, answers), answers))
        if arguments.json:
            write_json(config, measured, arguments.json)
    summaries = [summary for summary, _ in measured]
    if arguments.picture:
        draw(summaries, arguments.picture)
    _tell(summaries)


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable) if variable and "=" not in variable else None
    if not key:
        raise SettingsError(f"--key-variable {shown(variable)}: there is no such variable, or it is empty")
    return key


def _check_outputs(arguments: argparse.Namespace) -> None:
    if arguments.picture:
        if arguments.picture.suffix.lower() not in _ENDINGS:
            raise OutputError(
                f"--picture {arguments.picture}: expected a file whose name ends in {', '.join(_ENDINGS)}",
                "give another name",
            )
        require("--picture", "pictures")
    names: dict[str, Path | None] = {"--json": arguments.json, "--picture": arguments.picture}
    check_outputs([(option, file) for option, file in names.items() if file is not None])


def _config(arguments: argparse.Namespace) -> LoadConfig:
    from cat_pruning.serving.load import LoadConfig, endpoint_of

    fields: Mapping[str, Any] = {
        "model": arguments.model,
        "n": arguments.n,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "speedup": arguments.speedup,
        "preset": arguments.preset,
    }
    return LoadConfig(
        endpoint=endpoint_of(arguments.address),
        rates=arguments.rate,
        requests=arguments.requests,
        prompts=tuple(arguments.prompt or _PROMPTS),
        sizes=arguments.size,
        body={name: value for name, value in fields.items() if value is not None} | arguments.body,
        image_seed=arguments.seed,
        draws=arguments.draws,
        warm_up=arguments.warm_up,
        timeout_s=arguments.timeout,
    )


def _measure(config: LoadConfig, rate: float, key: str | None) -> list[Answer]:
    from cat_pruning.serving.load import offer

    with progress(terminal(stderr=True)) as bar:
        task = bar.add_task(f"{rate:g} requests per second", total=config.requests)
        return asyncio.run(offer(config, rate, key, answered=lambda: bar.advance(task)))


def _tell(summaries: Sequence[RateSummary]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("offered/s", "images/s", "p50 s", "p95 s", "p99 s", "completed", "rejected", "failed"):
        table.add_column(column, justify="right")
    for summary in summaries:
        latencies = [f"{summary.latency_s[name]:.3f}" if summary.latency_s else "–" for name in ("p50", "p95", "p99")]
        counts = (summary.completed, summary.rejected, summary.failed)
        table.add_row(
            f"{summary.offered_per_s:g}", f"{summary.images_per_s:.3g}", *latencies, *(str(count) for count in counts)
        )
    terminal().print(table)
    said = {words: None for summary in summaries for words in (*summary.rejections, *summary.failures)}
    for words in list(said)[:10]:
        say(f"  {words}")
    late = max(summary.sent_late_s for summary in summaries)
    if late > 0.1:
        say(f"this client was up to {late:.2f} s behind: the latencies are partly its own")
    if not any(summary.completed for summary in summaries):
        raise ServerError(f"no request was answered with an image ({next(iter(said), 'nothing was said')})")


if __name__ == "__main__":
    sys.exit(main())
