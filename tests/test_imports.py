"""Imports point one way between the rooms: each room may import from those before it, and from no other."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
CORE = "core"  # the modules of `cat_pruning` itself
ORDER = (
    CORE,
    "plugins",
    "families",
    "bundle",
    "engines",
    "models",
    "checkpoints",
    "runtime",
    "serving",
    "exporter",
    "tools",
    "evaluation",
    "tuning",
)
FACADE = "cat_pruning/__init__.py"  # gives the public names, which lie in `runtime`


def sources() -> list[tuple[str, Path]]:
    """Every source file with the module path that it is installed at, but for the facade."""
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
            if place != FACADE:
                found.append((place, path))
    return found


def room_of(module: str) -> str:
    """The room of a module's dotted name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else CORE


def imported(source: str) -> Iterator[str]:
    """Every module of ours that a source imports, wherever in it: in functions and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "cat_pruning")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides its room"
            if node.module and node.module.split(".")[0] == "cat_pruning":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong(place: str, source: str) -> list[str]:
    """The imports that point to a later room."""
    own = room_of(place.removesuffix(".py").replace("/", "."))
    return [name for name in imported(source) if ORDER.index(room_of(name)) > ORDER.index(own)]


def test_every_folder_is_a_room() -> None:
    assert {room_of(package) for package in FOLDERS} == set(ORDER)
    assert len(sources()) > 90


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_one_way(room: str) -> None:
    of_room = [(place, path) for place, path in sources() if room_of(place.replace("/", ".")) == room]
    assert of_room
    assert {place: found for place, path in of_room if (found := wrong(place, path.read_text(encoding="utf-8")))} == {}


def test_an_import_that_points_back_is_found() -> None:
    hidden = "def late():\n    from cat_pruning.exporter import split\n"
    assert wrong("cat_pruning/runtime/image.py", hidden) == ["cat_pruning.exporter.split"]
    assert wrong("cat_pruning/tools/doctor.py", hidden) == []
    assert wrong("cat_pruning/errors.py", "import cat_pruning.families.sd3 as sd3") == ["cat_pruning.families.sd3"]
    assert wrong("cat_pruning/families/sd3.py", "from cat_pruning import bundle, errors") == ["cat_pruning.bundle"]
