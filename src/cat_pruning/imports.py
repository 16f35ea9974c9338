"""Imports of the large libraries, which are made where they are needed and not when a module of ours is imported."""

from __future__ import annotations

import threading
from typing import Any, Final

from cat_pruning.errors import CheckpointError

# Held by whoever imports diffusers or transformers. Their modules import each other in circles, and Python lets a
# second thread that enters such a circle see modules that are half made. It is taken before any module's own lock, so
# never by the top level of a module.
importing: Final = threading.RLock()


def diffusers_class(name: str) -> Any:
    """A class of diffusers by its name; imports what defines it.

    Raises:
        CheckpointError: this diffusers has none.
    """
    with importing:
        import diffusers

        found = getattr(diffusers, name, None)
    if found is None:
        raise CheckpointError(
            f"diffusers {diffusers.__version__} has no class {name}",
            "update diffusers; a class of your own runs by CatTransformer.from_model",
        )
    return found
