"""What `make docs` takes into the site from elsewhere: the results, their JSON files and the changelog.

Links between pages of the site and files of the repository differ: a page that says `../examples/README.md` is right in
the repository and has nothing to lead to in the site. Such links become plain text.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"results.md": ROOT / "benchmarks/RESULTS.md", "changelog.md": ROOT / "CHANGELOG.md"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?:|#|mailto:)[^)\s]+)\)")
# In a table, a space between a number and what belongs to it.
UNIT = re.compile(r"(?<=\d) (?=(?:[GT]|[MG]i?B|dB|m?s|%)(?!\w))|(?<=\d) (?=[±→])|(?<=[±→]) (?=\d)")
NO_BREAK = "\N{NO-BREAK SPACE}"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the results' files."""
    for name, path in PAGES.items():
        files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leave the words of a link that leads out of the site."""

    def kept(match: re.Match[str]) -> str:
        words, target = match.groups()
        leads_out = PurePosixPath(target).parts[0] == ".." or target.endswith("/")
        return words if leads_out else match[0]

    lines = (UNIT.sub(NO_BREAK, line) if line.startswith("|") else line for line in markdown.split("\n"))
    return LINK.sub(kept, "\n".join(lines))
