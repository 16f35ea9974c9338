"""What `cat-bundle inspect` and `diff` print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from cat_pruning.console import file_size
from cat_pruning.names import TITLES
from cat_pruning.terminal import say

if TYPE_CHECKING:
    from rich.console import Console

    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.tools.bundle_contents import Contents
    from cat_pruning.tools.bundle_diff import Difference

_NONE = "–"
_NUMBERS = ("files", "full steps", "size", "speedup")


def print_contents(screen: Console, contents: Contents) -> None:
    """Print what is in a bundle."""
    say(f"{contents.path}  {file_size(contents.size)}", to=screen, style="bold")
    say("signed" if contents.signed else "not signed", to=screen)
    source = " at ".join(filter(None, (contents.source["location"], contents.source["revision"])))
    say(f"{contents.transformer_class} in {_precision(contents)}, exported from {source}", to=screen)
    say(f"plans are for {', '.join(contents.profiles)}, {contents.text_length} text tokens", to=screen)
    if contents.pipeline and contents.pipeline["kind"] == "hub":
        say(f"the pipeline's other parts are {contents.pipeline['hub_id']}'s on the hub", to=screen)
    say("settings: " + ", ".join(f"{name} {_value(value)}" for name, value in contents.settings.items()), to=screen)
    parts = [(each.name, str(each.num_files), file_size(each.size)) for each in contents.parts]
    screen.print(_table(("part", "files", "size"), parts))
    if contents.plans:
        rows = [
            (
                each.name,
                f"{TITLES[each.flavour]} {each.version}",
                ", ".join(each.architectures),
                each.token_ops + (", refittable" if each.refittable else ""),
                file_size(each.size),
            )
            for each in contents.plans
        ]
        screen.print(_table(("plans", "of", "for", "token operators", "size"), rows))
    if contents.schedules:
        schedules = [
            (
                each.name,
                f"{each.full_steps} of {each.num_steps}",
                f"{each.speedup:.3g}×",
                file_size(each.size),
            )
            for each in contents.schedules
        ]
        screen.print(_table(("schedule", "full steps", "speedup", "size"), schedules))


def _precision(contents: Contents) -> str:
    """The dtype, and how the step was quantized."""
    words = [contents.dtype]
    if contents.quantization:
        by = f" by {contents.calibration}" if contents.calibration is not None else ""
        words.append(f"its step in {contents.quantization}{by}")
    if contents.unquantized:
        words.append(f"but for {' '.join(contents.unquantized)}")
    return ", ".join(words)


def print_differences(screen: Console, first: Bundle, second: Bundle, found: Iterable[Difference]) -> None:
    """Print how two bundles differ."""
    rows = [(each.section, each.name, _value(each.first), _value(each.second)) for each in found]
    screen.print(_table(("", "", str(first.path), str(second.path)), rows))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(Text(column), justify="right" if column in _NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _value(value: Any) -> str:
    if value is None:
        return _NONE
    return value if isinstance(value, str) else json.dumps(value)
