"""The miniatures by name, and the one that a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

from mini_models import Miniature
from mini_pixart import PixArtMini
from mini_sd3 import Sd3Mini, Sd3Mini256

MINIATURES: dict[str, Miniature] = {miniature.name: miniature for miniature in (Sd3Mini(), Sd3Mini256(), PixArtMini())}


def miniature_in(folder: Path) -> Miniature:
    """The miniature whose class of pipeline the folder holds.

    Raises:
        FileNotFoundError: there is no pipeline in the folder.
        ValueError: it is of a class that has no miniature.
    """
    file = folder / "model_index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no model_index.json; expected a pipeline in the diffusers layout")
    found = json.loads(file.read_text())["_class_name"]
    by_class = {miniature.pipeline_class.__name__: miniature for miniature in MINIATURES.values()}
    if found not in by_class:
        raise ValueError(f"{folder} has a {found}; expected one of {', '.join(by_class)}")
    return by_class[found]
