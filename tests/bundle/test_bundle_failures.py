"""Bundles whose writing fails, is killed, or is done side by side."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bundle_files import STEP, export, fill, names

from cat_pruning.bundle.bundle import Bundle, BundleWriter, new_bundle
from cat_pruning.bundle.manifest import Manifest
from cat_pruning.errors import BundleError, EngineError, OutputError

# Reads the manifest, then again and again: out, force and the event to die at, and answers with an exit code. Each
# export is in a fork. Every operation of it on the file system is an audit event, raised before it happens; the fork
# kills itself at one of them.
CHILD = """
import os, signal, sys
from pathlib import Path
from cat_pruning.bundle.bundle import new_bundle
from cat_pruning.bundle.manifest import Manifest

def write(out, force, last):
    seen = 0

    def die_at_last(event, arguments):
        nonlocal seen
        about = any(str(out.name) in os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes, os.PathLike)))
        kinds = ("open", "os", "shutil")
        if event in ("test.half", "os.remove", "os.rmdir") or (event.split(".")[0] in kinds and about):
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(die_at_last)
    with new_bundle(out, force=force, needed_bytes=1) as writer:
        for name in ("prompt.onnx", "timestep.onnx"):
            (writer.path / name).write_bytes(b"a graph")
        with (writer.path / "step.onnx").open("wb") as file:
            file.write(b"a step")
            file.flush()
            sys.audit("test.half")
            file.write(b" graph")
        (writer.path / "pipeline").mkdir()
        (writer.path / "pipeline" / "model_index.json").write_text("{}")
        writer.commit(manifest)

manifest = Manifest.model_validate_json(sys.stdin.readline())
for line in sys.stdin:
    out, force, last = line.rstrip().split("\\t")
    if (pid := os.fork()) == 0:
        code = 1
        try:
            write(Path(out), force == "force", int(last))
            code = 0
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

# Run with: out, the limit of a file's size in bytes (0: none), how to write; the manifest on stdin.
FILL = """
import resource, shutil, signal, sys
from pathlib import Path
import numpy
from cat_pruning.bundle.bundle import new_bundle
from cat_pruning.errors import OutputError

out, limit, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
big = Path(sys.argv[4]) / "big"
big.mkdir()
(big / "weights").write_bytes(bytes(1 << 20))
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with new_bundle(out, force=False, needed_bytes=3000) as writer:
        if how == "write":
            (writer.path / "step.onnx").write_bytes(bytes(1 << 20))
        elif how == "tofile":
            with (writer.path / "step.onnx").open("wb") as file:
                numpy.zeros(1 << 20, numpy.uint8).tofile(file)
        else:
            shutil.copytree(big, writer.path / "pipeline")
except OutputError as error:
    print(error)
    print(sorted(path.name for path in out.parent.iterdir()))
"""


def throw(error: BaseException) -> Callable[[BundleWriter], object]:
    def then(writer: BundleWriter) -> None:
        raise error

    return then


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@contextlib.contextmanager
def live_pid() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


# ------------------------------------------------------------------ exports that fail


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), OSError(errno.EACCES, "x")])
@pytest.mark.parametrize("force", [False, True])
def test_an_exception_leaves_nothing_and_the_old_bundle(
    tmp_path: Path, manifest: Manifest, error: BaseException, force: bool
) -> None:
    old = export(tmp_path / "sd3", manifest) if force else None
    with pytest.raises(type(error)):
        export(tmp_path / "sd3", manifest, force=force, step=b"new", then=throw(error))
    assert names(tmp_path) == (["sd3"] if force else [])
    assert old is None or Bundle.open(tmp_path / "sd3") == old


def test_a_block_without_commit_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="without commit"), new_bundle(tmp_path / "a", force=False, needed_bytes=1):
        pass
    assert names(tmp_path) == []


def test_the_old_bundle_is_put_back_when_the_rename_fails(
    tmp_path: Path, bundle: Bundle, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse_partial(path: Path, target: Path) -> Path:
        if "partial" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_partial)
    with pytest.raises(OutputError, match=r"cannot be renamed to .*sd3 \(Permission denied\); give another --out"):
        export(bundle.path, manifest, force=True, step=b"second")
    assert names(tmp_path) == ["sd3"]
    assert Bundle.open(bundle.path).verified("step.onnx").read_bytes() == STEP


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_the_system_calls_a_full_disk(tmp_path: Path, manifest: Manifest, code: int) -> None:
    with pytest.raises(OutputError, match=r"disk full \(.*sd3 needs about .* GiB, .* GiB free on that disk; make room"):
        export(tmp_path / "sd3", manifest, then=throw(OSError(code, os.strerror(code))))
    assert names(tmp_path) == []


def test_an_error_of_ours_is_not_taken_for_a_full_disk(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(EngineError, match="No space left"):
        export(tmp_path / "sd3", manifest, then=throw(EngineError("the builder says: No space left on device")))


@pytest.mark.parametrize("how", ["write", "tofile", "copytree"])
def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path: Path, how: str) -> None:
    (tmp_path / "outs").mkdir()
    command = [sys.executable, "-c", FILL, str(tmp_path / "outs" / "sd3"), "4096", how, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    message, left = result.stdout.splitlines()
    assert message.startswith("disk full (")
    assert "sd3 needs about 2.794e-06 GiB" in message
    assert "make room or give another --out" in message
    assert left == "[]"


@pytest.mark.parametrize("how", ["write", "tofile", "copytree"])
def test_a_disk_that_becomes_full(tmp_path: Path, how: str) -> None:
    (tmp_path / "disk").mkdir()
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mounted = f"mount -t tmpfs -o size=64k tmpfs {tmp_path}/disk"
    if shutil.which("unshare") is None or subprocess.run([*mount, mounted], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk (unshare --map-root-user --mount)")
    command = [*mount, f'{mounted} && exec "$@"', "sh"]
    command += [sys.executable, "-c", FILL, str(tmp_path / "disk" / "sd3"), "0", how, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    message, left = result.stdout.splitlines()
    assert message.startswith("disk full (")
    assert "sd3 needs about 2.794e-06 GiB, 6.104e-05 GiB free on that disk; make room" in message
    assert left == "[]"


# ------------------------------------------------------------------ exports that are killed, exports side by side


@pytest.mark.long
@pytest.mark.parametrize("force", [False, True])
def test_killed_at_any_operation_an_export_leaves_nothing_that_loads(
    tmp_path: Path, manifest: Manifest, force: bool
) -> None:
    kills = 0
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(manifest.model_dump_json() + "\n")
        while True:
            parent = tmp_path / str(kills)
            out = parent / "sd3-out"
            parent.mkdir()
            if force:
                export(out, manifest, step=b"old")
            child.stdin.write(f"{out}\t{'force' if force else 'no'}\t{kills}\n")
            code = int(child.stdout.readline())
            if code == 0:
                break
            assert code == -signal.SIGKILL
            check_what_is_left(parent, out, force)
            with contextlib.suppress(OutputError):  # it may be complete; then only --force replaces it
                export(out, manifest)
            assert names(parent) == ["sd3-out"]
            export(out, manifest, force=True, step=b"next")
            assert Bundle.open(out).verified("step.onnx").read_bytes() == b"next"
            assert names(parent) == ["sd3-out"]
            kills += 1
    assert kills > 10  # directories, files, the manifest, the renames


def check_what_is_left(parent: Path, out: Path, force: bool) -> None:
    """Whatever loads is complete, and one of the two; where there was a bundle, one is still there."""
    loaded = []
    for path in parent.iterdir():
        with contextlib.suppress(BundleError):
            bundle = Bundle.open(path)
            assert path == out or path.name.startswith(f".{out.name}.replaced-")
            bundle.verified_tree("pipeline")
            loaded.append(bundle.verified("step.onnx").read_bytes())
    assert set(loaded) <= {STEP, b"old"}
    assert loaded or not force
    if force and not out.exists():
        with pytest.raises(BundleError, match=r"does not exist, but .*replaced-\d+, which an export was replacing"):
            Bundle.open(out)


def test_a_bundle_that_was_being_replaced_comes_back(tmp_path: Path, bundle: Bundle, manifest: Manifest) -> None:
    bundle.path.rename(tmp_path / f".sd3.replaced-{dead_pid()}")
    with pytest.raises(OutputError, match="exists; pass --force"):
        export(bundle.path, manifest, step=b"new")
    assert Bundle.open(bundle.path) == bundle
    assert names(tmp_path) == ["sd3"]


@pytest.mark.parametrize("role", ["partial", "replaced"])
def test_only_what_dead_processes_left_is_removed(tmp_path: Path, manifest: Manifest, role: str) -> None:
    dead = dead_pid()
    with live_pid() as alive:
        kept = {f".sd3.5.{role}-{alive}", ".sd3.5.partial-x", f".other.{role}-{dead}", f".sd3x5.{role}-{dead}"}
        gone = {f".sd3.5.{role}-{dead}", f".sd3.5.{role}-{os.getpid()}", f".sd3.5.partial-{10**30}"}
        (tmp_path / "sd3.5").mkdir()
        for name in kept | gone:
            (tmp_path / name / "pipeline").mkdir(parents=True)
        export(tmp_path / "sd3.5", manifest, force=True)
        assert set(names(tmp_path)) == kept | {"sd3.5"}


def test_exports_to_several_outs_at_once(tmp_path: Path, manifest: Manifest) -> None:
    inside = threading.Barrier(4)

    def one(name: str) -> None:
        with new_bundle(tmp_path / name, force=False, needed_bytes=1) as writer:
            inside.wait(timeout=60)
            fill(writer, name.encode())
            inside.wait(timeout=60)
            writer.commit(manifest)

    outs = ["sd3", "sd3-fp16", "sd3.5", "[sd3]"]
    threads = [threading.Thread(target=one, args=(name,)) for name in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == sorted(outs)
    for name in outs:
        assert Bundle.open(tmp_path / name).verified("step.onnx").read_bytes() == name.encode()


def test_one_export_fails_beside_another(tmp_path: Path, manifest: Manifest) -> None:
    with new_bundle(tmp_path / "a", force=False, needed_bytes=1) as first:
        fill(first)
        with pytest.raises(ValueError, match="no"):
            export(tmp_path / "b", manifest, then=throw(ValueError("no")))
        first.commit(manifest)
    assert names(tmp_path) == ["a"]
    Bundle.open(tmp_path / "a").verified_tree("pipeline")
