"""The documents against the code: links lead somewhere, quoted messages exist, Python in them parses."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
DOCS = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "examples/README.md")] + DOCS
GENERATED = {
    "results.md": ROOT / "benchmarks/RESULTS.md",
    "changelog.md": ROOT / "CHANGELOG.md",
}  # by docs/site_hooks.py
LINK = re.compile(r"\[[^\]]*\]\((?!https?:|mailto:)([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SPECIFIER = "…"
POLYGRAPHYS = {
    "--atol",
    "--convert-to",
    "--data-loader-script",
    "--load-outputs",
    "--model-type",
    "--onnxrt",
    "--optimization-profile",
    "--output",
    "--rtol",
    "--save-outputs",
    "--show",
    "--strongly-typed",
    "--trt",
    "--trt-config-script",
    "--trt-outputs",
    "--validate",
}


def prose(text: str) -> str:
    """Without blocks and pieces of code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(path: Path) -> set[str]:
    """What GitHub and mkdocs make of the headings."""
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in HEADING.findall(path.read_text()))
    return {re.sub(r"\s", "-", each) for each in words}


def broken_links(path: Path) -> list[str]:
    broken = []
    for target in LINK.findall(prose(path.read_text())):
        name, _, anchor = target.partition("#")
        place = path.parent / name if name else path
        if path.parent.name == "docs":
            place = GENERATED.get(name, place)
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](page.md#a-title) [b](#nowhere) [c](gone.md) `[d](code)` [e](https://example.org)\n")
    assert broken_links(page) == ["#nowhere", "gone.md"]


def test_every_page_is_in_the_navigation() -> None:
    """As `make docs` demands; here it costs nothing."""
    pages = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert pages == {path.name for path in DOCS} | set(GENERATED)


def test_the_readme_fits_a_screen_or_two() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 150


def texts(source: str) -> set[str]:
    """Every text of a program, with … for what is formatted into it; texts added to each other are one."""
    return {text for node in ast.walk(ast.parse(source)) if (text := _text(node))}


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
        return "; ".join(_text(argument) or SPECIFIER for argument in node.args)  # a problem and its remedy
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return re.sub(f"{SPECIFIER}+", SPECIFIER, "".join(_text(part) or SPECIFIER for part in node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + (_text(node.right) or SPECIFIER)
    return ""


def sources() -> set[str]:
    found = {(ROOT / "Makefile").read_text()}
    for folder in FOLDERS.values():
        for path in (ROOT / folder).rglob("*.py"):
            found |= texts(path.read_text())
    return found


def quoted_messages() -> list[str]:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    return re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE)


def test_the_quoted_messages_are_the_codes() -> None:
    """Told apart from a message of before by the very words: a reworded error needs a reworded page."""
    known, quoted = sources(), quoted_messages()
    assert len(quoted) > 40
    assert [message for message in quoted if not any(message in text for text in known)] == []


def test_a_message_is_read_as_it_is_formatted() -> None:
    code = 'raise ValueError(f"{name}={value!r}: expected " + f"at most {most}" + rest)'
    assert "…=…: expected at most …" in {text[:-1] for text in texts(code)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_in_the_documents_parses(path: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL):
        ast.parse(block)


def test_the_options_in_the_documents_exist() -> None:
    """An option that no parser of ours has is a typing error, or was renamed."""
    known = set(re.findall(r"--[a-z][a-z-]+", "\n".join(sources())))
    known |= {"--constraint", "--no-deps", "--wheel-dir", "--randomly-seed"}  # pip's and pytest's
    for folder in ("benchmarks", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r'"(--[a-z][a-z-]+)"', path.read_text()))
    for path in DOCUMENTS:
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text()))
        if path.name == "debugging.md":
            used -= POLYGRAPHYS
        assert used <= known, path
