"""The trained miniatures that come with the package, in the diffusers layout."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def miniatures() -> dict[str, Path]:
    """Name -> directory of every packaged miniature."""
    here = Path(str(files(__name__)))
    return {path.name: path for path in sorted(here.iterdir()) if (path / "model_index.json").is_file()}
