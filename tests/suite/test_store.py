"""The store of what is dear to make."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
from store import KEPT_SECONDS, Store, digest_of_sources


def fill(folder: Path) -> None:
    (folder / "made").write_text("once")


def take(place: Path, made: Path) -> None:
    """In a process of its own: every making leaves a file."""

    def slowly(folder: Path) -> None:
        time.sleep(0.1)
        (made / str(os.getpid())).touch()
        fill(folder)

    assert (Store(place).entry("mini", ["a"], slowly) / "made").read_text() == "once"


def test_processes_that_want_one_at_once_make_one(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=take, args=(tmp_path / "store", made)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(list(made.iterdir())) == 1


def test_an_entry_is_made_anew_when_what_makes_it_changes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.entry("mini", ["torch 2"], fill)
    assert store.entry("mini", ["torch 2"], lambda folder: pytest.fail("it was there")) == first
    assert store.entry("mini", ["torch 3"], fill) != first
    assert not os.access(first / "made", os.W_OK) or os.geteuid() == 0
    assert (first / "made").stat().st_mode & 0o222 == 0


def test_one_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Store(tmp_path).entry("mini", ["a"], fail)
    assert list((tmp_path / "mini").glob("*[!.lock]")) == []
    assert (Store(tmp_path).entry("mini", ["a"], fill) / "made").exists()


def test_the_entry_used_last_stays_of_each_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    entries = [store.entry(name, [made_of], fill) for name in ("mini", "trace") for made_of in ("1", "2", "3")]
    left = tmp_path / "mini" / "making-it"
    left.mkdir()
    store.clean()
    assert all(entry.exists() for entry in (*entries, left))  # within the hour
    for age, entry in enumerate(entries):
        then = time.time() - KEPT_SECONDS - 100 + age
        os.utime(entry.with_suffix(".used"), (then, then))
    os.utime(left, (0, 0))
    store.clean()
    assert [entry.exists() for entry in entries] == [False, False, True] * 2
    assert sorted(path.name for path in (tmp_path / "mini").iterdir()) == sorted(
        [entries[2].name, f"{entries[2].name}.lock", f"{entries[2].name}.used"]
    )


def test_sources_are_told_apart() -> None:
    assert digest_of_sources("plugins") == digest_of_sources("plugins")
    assert len({digest_of_sources(name) for name in ("plugins", "families", "exporter/split.py")}) == 3
