"""The miniatures by name, and the one that a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

from mini_models import Miniature
from mini_pixart import PixArtMini
from mini_sd3 import Sd3Mini, Sd3Mini256

MINIATURES: dict[str, Miniature] = {miniature.name: miniature for miniature in (Sd3Mini(), Sd3Mini256(), PixArtMini())}


def miniature_in(folder: Path) -> Miniature:
    """The miniature whose class of pipeline the folder holds, and whose captions are as long.

    Raises:
        FileNotFoundError: there is no pipeline in the folder.
        ValueError: it is of a class that has no miniature.
    """
    file = folder / "model_index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no model_index.json; expected a pipeline in the diffusers layout")
    found = json.loads(file.read_text())["_class_name"]
    of_class = [each for each in MINIATURES.values() if each.pipeline_class.__name__ == found]
    if not of_class:
        known = ", ".join(sorted({each.pipeline_class.__name__ for each in MINIATURES.values()}))
        raise ValueError(f"{folder} has a {found}; expected one of {known}")
    # Miniatures of one class differ in the length of their captions.
    length = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"]
    return next((each for each in of_class if each.text_length == length), of_class[0])
