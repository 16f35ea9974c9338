from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cat_pruning.bundle.bundle import Bundle, BundleWriter, new_bundle
from cat_pruning.bundle.manifest import MANIFEST_NAME, Manifest
from cat_pruning.bundle.schema import Geometry, GraphSpec, PipelineSpec, ProfileSpec, Source
from cat_pruning.dtype import DType
from cat_pruning.errors import BundleError, EngineError, OutputError
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part

STEP = b"a step graph"

# Run with: out, force, the event to die at, and the manifest on stdin. Every operation of the export on
# the file system is an audit event, raised before it happens; the process kills itself at one of them.
CHILD = """
import os, signal, sys
from pathlib import Path
from cat_pruning.bundle.bundle import new_bundle
from cat_pruning.bundle.manifest import Manifest

out, force, last = Path(sys.argv[1]), sys.argv[2] == "force", int(sys.argv[3])
manifest = Manifest.model_validate_json(sys.stdin.read())
seen = 0

def die_at_last(event, arguments):
    global seen
    about = any(str(out.name) in os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes, os.PathLike)))
    if event in ("test.half", "os.remove", "os.rmdir") or (event.split(".")[0] in ("open", "os", "shutil") and about):
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


@pytest.fixture
def manifest() -> Manifest:
    """A small SD3: 256 tokens at 256 x 256, 76 of them kept; one copied pipeline."""
    profile = ProfileSpec(
        name="256x256", height=256, width=256, prompts=1, batch=2, latent_height=32, latent_width=32,
        num_tokens=256, num_kept=76, text_length=13,
    )  # fmt: skip
    return Manifest(
        family="sd3",
        source=Source(kind="hub", location="some/sd3", revision="0123"),
        transformer_class="SD3Transformer2DModel",
        transformer_config={"num_layers": 2},
        dtype=DType.FP32,
        guidance=True,
        settings=PruneSettings(),
        geometry=Geometry(
            pixels_per_latent=8, patch_size=2, latent_channels=16, max_latent_size=None, text_length=13
        ),
        graphs=tuple(GraphSpec(part=part, file=part.onnx, inputs=(), outputs=()) for part in Part),
        profiles=(profile,),
        pipeline=PipelineSpec(kind="copied", path="pipeline"),
        versions={"torch": "2.13.0"},
    )  # fmt: skip


def fill(writer: BundleWriter, step: bytes = STEP) -> None:
    for part in Part:
        (writer.path / part.onnx).write_bytes(step if part is Part.STEP else b"a graph")
    (writer.path / "pipeline" / "vae").mkdir(parents=True)
    (writer.path / "pipeline" / "model_index.json").write_text("{}")
    (writer.path / "pipeline" / "vae" / "config.json").write_text("{}")


def export(
    out: Path,
    manifest: Manifest,
    *,
    force: bool = False,
    step: bytes = STEP,
    then: Callable[[BundleWriter], object] = lambda writer: None,
) -> Bundle:
    with new_bundle(out, force=force, needed_bytes=1) as writer:
        fill(writer, step)
        then(writer)
        return writer.commit(manifest)


def throw(error: BaseException) -> Callable[[BundleWriter], object]:
    def then(writer: BundleWriter) -> None:
        raise error

    return then


@pytest.fixture
def bundle(tmp_path: Path, manifest: Manifest) -> Bundle:
    return export(tmp_path / "sd3", manifest)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@contextlib.contextmanager
def live_pid() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


# ------------------------------------------------------------------ a bundle as it should be


def test_round_trip(tmp_path: Path, bundle: Bundle, manifest: Manifest) -> None:
    opened = Bundle.open(tmp_path / "sd3")
    assert opened == bundle == Bundle.open(str(tmp_path / "sd3"))
    assert set(opened.manifest.files) == {
        *("prompt.onnx", "timestep.onnx", "step.onnx"),
        *("pipeline/model_index.json", "pipeline/vae/config.json"),
    }
    assert opened.manifest.with_files({}) == manifest
    assert opened.verified("step.onnx").read_bytes() == STEP
    assert opened.verified_tree("pipeline") == tmp_path / "sd3" / "pipeline"
    assert names(tmp_path) == ["sd3"]


def test_a_relative_path_and_a_link(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latest").symlink_to("sd3")
    assert Bundle.open(tmp_path / "latest") == bundle
    monkeypatch.chdir(bundle.path)
    assert Bundle.open(".") == bundle


def test_export_command(bundle: Bundle) -> None:
    assert bundle.export_command("tensorrt_rtx") == (
        "cat-export --model some/sd3 --dtype fp32 --revision 0123 --resolution 256x256 --batch 1 --text-length 13 "
        f"--keep-ratio 0.3 --target tensorrt_rtx --out {bundle.path} --force"
    )


# ------------------------------------------------------------------ what open and verified refuse


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"sd3 does not exist; give the --out of cat-export"):
        Bundle.open(tmp_path / "sd3")


def test_a_file_instead_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "sd3.onnx").touch()
    with pytest.raises(BundleError, match=r"sd3\.onnx is a file, expected a directory; give the --out of cat-export"):
        Bundle.open(tmp_path / "sd3.onnx")


def test_no_manifest(bundle: Bundle) -> None:
    (bundle.path / MANIFEST_NAME).unlink()
    with pytest.raises(BundleError, match=r"not a bundle, or an export that was interrupted; run cat-export again"):
        Bundle.open(bundle.path)


def test_another_format_version(bundle: Bundle) -> None:
    path = bundle.path / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 6}))
    with pytest.raises(BundleError, match=r"format version 6, .* version 5; .* cat-export --model some/sd3 --out"):
        Bundle.open(bundle.path)


def test_an_unfinished_export_is_refused_by_name_even_if_complete(tmp_path: Path, bundle: Bundle) -> None:
    partial = bundle.path.rename(tmp_path / ".sd3.partial-12")
    (tmp_path / "link").symlink_to(partial)
    for path in (partial, tmp_path / "link"):
        with pytest.raises(BundleError, match=r"\.sd3\.partial-12 is an unfinished export; run cat-export again"):
            Bundle.open(path)


def test_a_missing_file(bundle: Bundle) -> None:
    (bundle.path / "step.onnx").unlink()
    with pytest.raises(BundleError, match=r"step\.onnx is missing, expected 12 bytes; run .*--out .*sd3 --force"):
        Bundle.open(bundle.path)


def test_a_truncated_file(bundle: Bundle) -> None:
    os.truncate(bundle.path / "step.onnx", 5)
    with pytest.raises(BundleError, match=r"step\.onnx has 5 bytes, expected 12: truncated or edited; run cat-export"):
        Bundle.open(bundle.path)


def test_an_edited_byte(bundle: Bundle) -> None:
    edit(bundle.path / "step.onnx")
    opened = Bundle.open(bundle.path)  # which reads no file
    with pytest.raises(BundleError, match=r"step\.onnx was changed after the export: .* cat-export --model some/sd3"):
        opened.verified("step.onnx")
    opened.verified_tree("pipeline")


def test_a_file_is_hashed_once_and_again_when_it_changed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle.verified("step.onnx")
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("hashed again"))
        assert bundle.verified("step.onnx") == Bundle.open(bundle.path).verified("step.onnx") == path
    before = path.stat()
    edit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    with pytest.raises(BundleError, match=r"step\.onnx was changed"):
        bundle.verified("step.onnx")


def test_a_file_that_is_not_listed(bundle: Bundle) -> None:
    (bundle.path / "other.plan").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"lists no file 'other\.plan', only pipeline/.*; run cat-export again"):
        bundle.verified("other.plan")


def test_a_file_that_vanishes_after_open(bundle: Bundle) -> None:
    (bundle.path / "step.onnx").unlink()
    with pytest.raises(BundleError, match=r"step\.onnx is missing"):
        bundle.verified("step.onnx")


def test_a_file_added_to_the_pipeline(bundle: Bundle) -> None:
    (bundle.path / "pipeline" / "vae" / "pytorch_model.bin").write_bytes(b"a pickle")
    opened = Bundle.open(bundle.path)
    with pytest.raises(BundleError, match=r"pipeline/vae/pytorch_model\.bin added after the export; remove that, or"):
        opened.verified_tree("pipeline")


def test_a_directory_linked_into_the_pipeline(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle.path / "pipeline" / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"pipeline/unet added after the export"):
        bundle.verified_tree("pipeline")


def test_a_file_edited_in_and_one_removed_from_the_pipeline(bundle: Bundle) -> None:
    path = bundle.path / "pipeline" / "vae" / "config.json"
    path.write_text("[]")
    with pytest.raises(BundleError, match=r"pipeline/vae/config\.json was changed after the export"):
        bundle.verified_tree("pipeline")
    path.unlink()
    with pytest.raises(BundleError, match=r"pipeline/vae/config\.json is missing"):
        bundle.verified_tree("pipeline")


def test_a_tree_that_is_not_listed(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"lists no files below pipe/; run cat-export again"):
        bundle.verified_tree("pipe")


# ------------------------------------------------------------------ where new_bundle writes


def test_parents_are_created(tmp_path: Path, manifest: Manifest) -> None:
    assert export(tmp_path / "a" / "b" / "sd3", manifest) == Bundle.open(tmp_path / "a" / "b" / "sd3")


def test_out_exists(bundle: Bundle, manifest: Manifest) -> None:
    with pytest.raises(OutputError, match=rf"{bundle.path} exists; pass --force to replace it or give another --out"):
        export(bundle.path, manifest)
    assert Bundle.open(bundle.path) == bundle


def test_force_replaces_a_bundle_also_through_a_link(tmp_path: Path, bundle: Bundle, manifest: Manifest) -> None:
    assert export(bundle.path, manifest, force=True, step=b"second").verified("step.onnx").read_bytes() == b"second"
    (tmp_path / "latest").symlink_to("sd3")
    export(tmp_path / "latest", manifest, force=True, step=b"third")
    assert Bundle.open(bundle.path).verified("step.onnx").read_bytes() == b"third"
    assert names(tmp_path) == ["latest", "sd3"]


def test_force_replaces_a_bundle_of_another_version_and_an_empty_directory(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / MANIFEST_NAME).write_text('{"format_version": 0}')
    for name in ("empty", "old"):
        export(tmp_path / name, manifest, force=True)
        Bundle.open(tmp_path / name).verified_tree("pipeline")


@pytest.mark.parametrize("content", [None, "", "[]", '{"manifest_version": 3}', "file"])
def test_force_never_deletes_what_is_not_a_bundle(tmp_path: Path, manifest: Manifest, content: str | None) -> None:
    out = tmp_path / "photos"
    if content == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "holiday.jpg").touch()
        if content is not None:
            (out / MANIFEST_NAME).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=rf"{out} is not a bundle .*remove it yourself or give another --out"):
        export(out, manifest, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_appears_during_the_export_is_not_replaced(tmp_path: Path, manifest: Manifest) -> None:
    out = tmp_path / "sd3"
    with pytest.raises(OutputError, match="exists; pass --force"):
        export(out, manifest, then=lambda writer: out.mkdir())
    assert names(tmp_path) == ["sd3"]
    assert names(out) == []


def test_the_parent_is_a_file(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/sd3 cannot be written .*; give an --out that you may write to"):
        export(tmp_path / "file" / "sd3", manifest)


def test_the_parent_is_not_writable(manifest: Manifest) -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, which another user could not even look into
        parent = Path(name)
        parent.chmod(0o555)
        user = os.geteuid()
        try:
            if user == 0:  # to whom permissions do not apply
                os.seteuid(65534)
            with pytest.raises(OutputError, match=r"sd3 cannot be written \(.*Permission denied.*give an --out"):
                export(parent / "sd3", manifest)
        finally:
            os.seteuid(user)
            parent.chmod(0o755)


def test_a_mount_point_is_refused_before_the_work() -> None:
    with (
        pytest.raises(OutputError, match=r"/proc is a mount point, .*give --out /proc/bundle"),
        new_bundle(Path("/proc"), force=True, needed_bytes=1),
    ):
        pytest.fail("entered")


def test_too_little_space_is_told_before_the_work(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with (
        pytest.raises(OutputError, match=r"a/sd3 needs about [\d.e+]+ GiB, [\d.e+]+ GiB free on that disk; make room"),
        new_bundle(tmp_path / "a" / "sd3", force=False, needed_bytes=free * 2),
    ):
        pytest.fail("entered")
    assert names(tmp_path) == []


def test_a_link_is_not_exported(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(OutputError, match=r"weights is a link to /cache/weights; copy the file"):
        export(tmp_path / "sd3", manifest, then=lambda writer: (writer.path / "weights").symlink_to("/cache/weights"))
    assert names(tmp_path) == []


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


@pytest.mark.parametrize("force", [False, True])
def test_killed_at_any_operation_an_export_leaves_nothing_that_loads(
    tmp_path: Path, manifest: Manifest, force: bool
) -> None:
    kills = 0
    while True:
        parent = tmp_path / str(kills)
        out = parent / "sd3-out"
        parent.mkdir()
        if force:
            export(out, manifest, step=b"old")
        command = [sys.executable, "-c", CHILD, str(out), "force" if force else "no", str(kills)]
        result = subprocess.run(command, input=manifest.model_dump_json(), capture_output=True, text=True)
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
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
