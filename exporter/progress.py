"""How the stages of an export are told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

logger = logging.getLogger(__name__)

Advance = Callable[[int, int], None]  # (done, total)
Stage = Callable[[str], AbstractContextManager[Advance]]  # title -> a stage of the export, while it runs


@contextmanager
def logged_stage(title: str) -> Iterator[Advance]:
    """Stages as lines of the log."""
    logger.info(title)
    yield lambda done, total: None
