"""What diffusers and transformers say on the side, and the first line of what they raise."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from cat_pruning.imports import importing


@contextmanager
def quiet_diffusers(*, errors: bool = True) -> Iterator[None]:
    """Without the progress bars and hints of a load that the caller reports on itself; nor `errors`, if false."""
    with importing:
        import diffusers
        import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.ERROR if errors else logging.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of an error's message, with the next where it ends in a colon; its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
