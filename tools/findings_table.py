"""How findings are printed: a mark, what was looked at, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from rich.table import Table
from rich.text import Text

from cat_pruning.terminal import visible
from cat_pruning.tools.findings import Finding

MARKS: Final = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


def findings_table(findings: Iterable[Finding], told: set[str], topics: Mapping[str, str] | None = None) -> Table:
    """A table of findings.

    Args:
        findings: in order.
        told: the remedies that were printed before, which are not printed again; those of this table are added.
        topics: how some topics are spelt for people.
    """
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(no_wrap=True, min_width=13)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = MARKS[finding.status]
        topic = (topics or {}).get(finding.topic, finding.topic)
        table.add_row(Text(mark, style=style), topic, Text(visible(finding.text)))
        if finding.remedy and finding.remedy not in told:  # once, where it is first needed
            table.add_row("", "", Text(visible(f"→ {finding.remedy}"), style="cyan"))
            told.add(finding.remedy)
    return table
