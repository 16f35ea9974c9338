"""The package from a checkout without an installation: a tree of links laid out as setuptools would lay it out."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def source_tree(out: Path = ROOT / "build" / "source") -> Path:
    """Make the tree, or bring it up to date, and return the folder to put on `sys.path`.

    pyproject.toml says which folder each package is in; a package's folder becomes a link in its parent's.
    """
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    for package, folder in folders.items():
        place = out.joinpath(*package.split("."))
        # The top package is a folder of links, because the others are not in its own.
        files = [path for path in (ROOT / folder).iterdir() if path.name != "__pycache__"]
        links = {place: ROOT / folder} if "." in package else {place / path.name: path for path in files}
        for link, target in links.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_symlink():
                link.unlink()
            link.symlink_to(target)
    return out


if __name__ == "__main__":
    sys.stdout.write(f"{source_tree()}\n")
