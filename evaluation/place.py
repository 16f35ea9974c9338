"""The directory of an evaluation: which files in it are the evaluation's, and who is at work there.

OUT/run.json        RunSpec: all that the results depend on; a run goes on only under the same, or grows by candidates
OUT/results.jsonl   ImageResult, one a line, appended as they come
OUT/images/{candidate}/{prompt}-{seed}.png        of the first prompts
OUT/tokens/{candidate}.png                        which tokens were computed, of the first prompt
OUT/report.html
OUT/.lock           empty, held while an evaluation is at work

Only these files are ever deleted or written over, and only where run.json lists their candidates: it is written first
and deleted last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.files import check_writable_directory
from cat_pruning.ours import check_ours

RUN, RESULTS, REPORT, IMAGES, TOKENS = "run.json", "results.jsonl", "report.html", "images", "tokens"
PLACES = (RUN, RESULTS, REPORT, IMAGES, TOKENS)
REMEDY = "give another --out"
_LOCK = ".lock"


def picture_place(candidate: str, prompt: int) -> str:
    """The file of a candidate's first image of a prompt, relative to the directory."""
    return f"{IMAGES}/{candidate}/{prompt:05d}-0.png"


def token_map_place(candidate: str) -> str:
    """The file of a candidate's token map, likewise."""
    return f"{TOKENS}/{candidate}.png"


def check_writable_place(directory: Path) -> None:
    """Check that an evaluation can be written to a directory, which need not exist.

    Raises:
        OutputError: it cannot, or has a `.lock` that is not empty, so not an evaluation's.
    """
    lock = directory / _LOCK
    try:
        check_writable_directory(directory)
        foreign = lock.is_file() and lock.stat().st_size > 0
    except OSError as error:
        raise OutputError(f"{directory} cannot be written ({error.strerror or error})", REMEDY) from error
    if foreign:
        raise OutputError(f"{lock} is not empty, and so not an evaluation's", f"move it away, or {REMEDY}")


def check_listed(directory: Path, listed: Collection[str], among: Collection[str] | None = None) -> None:
    """Check that what lies where an evaluation writes is an evaluation's.

    Args:
        directory: which need not exist.
        listed: the files of the evaluation that is there.
        among: look at these files only.

    Raises:
        OutputError: a file is not listed.
    """
    check_ours(directory, listed, PLACES, f"an evaluation's {RUN}", REMEDY, among)


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep other evaluations out of `directory` meanwhile. The directory is made if it is not there.

    Raises:
        SettingsError: another one is at work in it.
        OutputError: it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory} cannot be written ({error.strerror})", REMEDY) from error
    lock = FileLock(directory / _LOCK)  # the system lets go of it when the process ends, however it ends
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise SettingsError(
            f"{directory}: another cat-eval is at work there", "wait for it, or give another --out"
        ) from error
    except OSError as error:
        raise OutputError(f"{directory} cannot be locked ({error.strerror})", REMEDY) from error
    try:
        yield
    finally:
        lock.release()
