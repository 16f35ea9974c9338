"""The published checkpoints that `--model` knows by name: one JSON file each in `checkpoints/configs`.

Another size of a known family is one more file there, and no code.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cat_pruning.families.family import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published checkpoint.

    hub_id: where its pipeline is. transformer: the transformer's config. pixels_per_latent: its autoencoder's factor.
    text_length: T, the text rows of its pipeline at the defaults.
    """

    hub_id: str
    transformer_class: str
    transformer: dict[str, Any]
    pixels_per_latent: int
    text_length: int

    @property
    def family(self) -> type[Family]:
        """The family of its transformer; imports torch, which the names do not need."""
        from cat_pruning.families import family_of_class

        return family_of_class(self.transformer_class)


@functools.cache
def published_models() -> dict[str, Published]:
    """Every published checkpoint by its name on the command line."""
    configs = sorted((files("cat_pruning.checkpoints") / "configs").iterdir(), key=lambda path: path.name)
    return {path.name.removesuffix(".json"): Published(**json.loads(path.read_text())) for path in configs}
