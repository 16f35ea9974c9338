"""A bundle changed in its place: failing, killed, and by plans that are dropped."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_files import export_with_plans, names, plan_set

from cat_pruning.bundle import changes
from cat_pruning.bundle.bundle import Bundle, check_replaceable
from cat_pruning.bundle.changes import Change, change_bundle
from cat_pruning.bundle.manifest import CHANGING_NAME, Manifest
from cat_pruning.bundle.pruning import Dropped, prune_bundle
from cat_pruning.errors import OutputError, SettingsError

RTX = plan_set("tensorrt_rtx", "1.7", "sm80", "sm86")
SM90 = plan_set("tensorrt", "11.4", "sm90")
OLD = plan_set("tensorrt", "10.15", "sm90")


@pytest.fixture
def planned(tmp_path: Path) -> Bundle:
    return export_with_plans(tmp_path / "sd3", RTX, SM90, OLD)


def files(bundle: Bundle) -> set[str]:
    return {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["tensorrt"], (RTX,)),
        (["tensorrt-10.15-sm90"], (RTX, SM90)),
        (["tensorrt-1?.*", "tensorrt_rtx"], ()),
        (["*-sm90"], (RTX,)),
        ([], (RTX, SM90, OLD)),
    ],
)
def test_plans_are_dropped_and_nothing_else(planned: Bundle, patterns: list[str], left: tuple[object, ...]) -> None:
    dropped = prune_bundle(planned.path, patterns)
    now = Bundle.open(planned.path)
    assert now.manifest.plans == sum(left, ())
    assert files(now) == {"manifest.json", *now.manifest.files}
    assert sorted((now.path / "plans").iterdir() if left else []) == sorted(
        {(now.path / each[0].file).parent for each in left}
    )
    assert (now.path / "plans").exists() == bool(left)
    assert now.manifest.model_copy(update={"plans": (), "files": {}}) == planned.manifest.model_copy(
        update={"plans": (), "files": {}}
    )
    assert now.manifest.digest == planned.manifest.digest
    before, after = (sum(spec.size for spec in each.manifest.files.values()) for each in (planned, now))
    assert dropped.num_bytes == before - after
    assert len(dropped.plans) == 3 - len(left)


def test_what_is_not_there_is_told_and_nothing_is_dropped(planned: Bundle) -> None:
    with pytest.raises(SettingsError) as caught:
        prune_bundle(planned.path, ["tensorrt", "sm75", "tensorrt-9*"])
    assert str(caught.value) == (
        "the bundle has no plans 'sm75', 'tensorrt-9*'; it has tensorrt_rtx-1.7-sm80, tensorrt-11.4-sm90, "
        "tensorrt-10.15-sm90"
    )
    with pytest.raises(SettingsError, match="has no schedules '28-9'; it has none"):
        prune_bundle(planned.path, ["tensorrt"], ["28-9"])
    assert Bundle.open(planned.path) == planned
    assert files(planned) == {"manifest.json", *planned.manifest.files}


def in_a_fork_that_dies(work: Callable[[], object], about: Path, last: int) -> bool:
    """Does work in a fork that kills itself at one of its operations on files; whether it did."""
    if (pid := os.fork()) == 0:
        seen = 0

        def die(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            kinds = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
            if event in kinds and any(str(about) in str(each) for each in arguments):
                if seen == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(die)
        work()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.long
@pytest.mark.parametrize("adds", [False, True])
def test_killed_at_any_moment_it_is_the_old_one_or_the_new_one(tmp_path: Path, adds: bool) -> None:
    """And the next change, or the next export, clears away what was left."""
    content = tmp_path / "built.plan"
    spec = plan_set("tensorrt", "11.5", "sm90")[0]

    def work(path: Path) -> None:
        if adds:
            content.write_bytes(b"a new plan")
            added = {spec.file: content}
            change_bundle(path, lambda manifest: Change(fields={"plans": (*manifest.plans, spec)}, added=added))
        else:
            prune_bundle(path, ["tensorrt"])

    expected = {RTX + SM90, RTX + SM90 + (spec,) if adds else RTX}
    found, last, died = set(), 0, True
    while died:
        bundle = export_with_plans(tmp_path / f"{last}" / "sd3", RTX, SM90)
        died = in_a_fork_that_dies(lambda path=bundle.path: work(path), bundle.path, last)
        now = Bundle.open(bundle.path)
        for name in now.manifest.files:
            now.verified(name)
        found.add(now.manifest.plans)
        check_replaceable(bundle.path, force=True)  # nothing there is foreign
        prune_bundle(bundle.path)
        assert Bundle.open(bundle.path) == now
        left = {name for name in files(now) if not name.endswith(".part")}  # of writes that were killed
        assert left == {"manifest.json", *now.manifest.files}
        last += 1
    assert found == expected
    assert last > 10


def test_a_change_that_fails_leaves_the_bundle_as_it_was(planned: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    put = changes._put

    def full(path: Path, content: bytes | Path) -> object:
        put(path, content)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(changes, "_put", full)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); make room"):
        change_bundle(planned.path, lambda manifest: Change(fields={}, added={"plans/new/step.plan": b"a plan"}))
    assert Bundle.open(planned.path) == planned
    assert names(planned.path / "plans") == ["tensorrt-10.15-sm90", "tensorrt-11.4-sm90", "tensorrt_rtx-1.7-sm80"]
    assert CHANGING_NAME not in names(planned.path)


def test_a_bundle_that_is_a_disk_of_its_own(planned: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built beside it cannot be renamed into it, and is copied."""
    built, replace = tmp_path / "built.plan", Path.replace
    built.write_bytes(b"a plan")

    def other_disk(path: Path, target: Path) -> Path:
        if path == built:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", other_disk)
    now = change_bundle(planned.path, lambda manifest: Change(fields={}, added={"plans/new/step.plan": built}))
    assert now.verified("plans/new/step.plan").read_bytes() == b"a plan"


def test_an_interruption_after_the_manifest_was_replaced(planned: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was added is listed by then, and stays."""
    write = changes.write_whole

    def interrupted(path: Path, content: str | bytes) -> None:
        write(path, content)
        if path.name == "manifest.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(changes, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        change_bundle(planned.path, lambda manifest: Change(fields={}, added={"plans/new/step.plan": b"a plan"}))
    assert Bundle.open(planned.path).verified("plans/new/step.plan").read_bytes() == b"a plan"


@pytest.mark.parametrize("journal", ["", "[1]", '["../outside.txt"]', '["/etc/passwd"]', "[" * 9999])
def test_a_record_of_a_change_that_is_none_deletes_nothing(planned: Bundle, tmp_path: Path, journal: str) -> None:
    (tmp_path / "outside.txt").write_text("mine")
    (planned.path / CHANGING_NAME).write_text(journal)
    assert prune_bundle(planned.path) == Dropped(plans=(), schedules=(), num_bytes=0)
    assert (tmp_path / "outside.txt").read_text() == "mine"
    assert files(planned) == {"manifest.json", *planned.manifest.files}


def test_what_the_manifest_lists_is_not_cleared_away(planned: Bundle) -> None:
    (planned.path / CHANGING_NAME).write_text('["step.onnx", "plans/gone.plan"]')
    (planned.path / "plans" / "gone.plan").touch()
    prune_bundle(planned.path)
    assert files(planned) == {"manifest.json", *planned.manifest.files}


def test_only_what_others_left_of_the_manifest_is_asked(planned: Bundle) -> None:
    """The change is made of the manifest as it is when nobody else changes it."""
    seen: list[Manifest] = []

    def change(manifest: Manifest) -> Change:
        seen.append(manifest)
        return Change(fields={})

    prune_bundle(planned.path, ["tensorrt_rtx"])
    assert change_bundle(planned.path, change).manifest == seen[0] == Bundle.open(planned.path).manifest
