"""Where a bundle is written, and what stands in the way."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from bundle_files import export, names

from cat_pruning.bundle.bundle import Bundle, check_replaceable, new_bundle
from cat_pruning.bundle.manifest import MANIFEST_NAME, Manifest
from cat_pruning.errors import OutputError

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
    (tmp_path / "old" / MANIFEST_NAME).write_text('{"format_version": 0, "files": {"gone.onnx": {}}}')
    for name in ("empty", "old"):
        export(tmp_path / name, manifest, force=True)
        Bundle.open(tmp_path / name).verified_tree("pipeline")


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"format_version": 6}', "[" * 9999, '{"files": {"holiday.jpg": 1}}']
)
@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_a_bundle_is_never_deleted(
    tmp_path: Path, manifest: Manifest, content: str | None, force: bool
) -> None:
    """Without --force nothing is said of it, which would be refused as well."""
    out = tmp_path / "photos"
    out.mkdir()
    (out / "holiday.jpg").touch()
    if content is not None:
        (out / MANIFEST_NAME).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=rf"{out} has holiday.jpg.*, not listed by a bundle's manifest.json: .*move"):
        export(out, manifest, force=force)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_deleted(tmp_path: Path, manifest: Manifest, force: bool) -> None:
    (tmp_path / "photos").write_text("mine")
    with pytest.raises(OutputError, match=r"photos is a file, and --force replaces only bundles; give another --out"):
        export(tmp_path / "photos", manifest, force=force)
    assert (tmp_path / "photos").read_text() == "mine"


@pytest.mark.parametrize("name", ["out.png", "pipeline/notes.txt", "schedules/mine.json", "images/a.png"])
def test_force_never_deletes_what_a_bundle_does_not_list(bundle: Bundle, manifest: Manifest, name: str) -> None:
    """A picture that cat-generate wrote there, say."""
    (bundle.path / name).parent.mkdir(exist_ok=True)
    (bundle.path / name).write_text("mine")
    with pytest.raises(OutputError, match=rf"{bundle.path} has {name}, not listed by a bundle's manifest.json"):
        export(bundle.path, manifest, force=True, step=b"second")
    assert (bundle.path / name).read_text() == "mine"
    assert Bundle.open(bundle.path) == bundle


def test_force_deletes_what_our_tools_leave_in_a_bundle(bundle: Bundle, manifest: Manifest) -> None:
    """Schedules that the manifest no longer lists, and what was being written when a process died."""
    (bundle.path / "schedules").mkdir()
    (bundle.path / "schedules" / "28-9.0123456789ab.json").touch()
    (bundle.path / "schedules" / ".28-9.0123456789ab.json.17-17.part").touch()
    (bundle.path / ".changing.json").write_text('["schedules/28-9.0123456789ab.json"]')
    (bundle.path / ".manifest.json.17-17.part").touch()
    export(bundle.path, manifest, force=True)
    assert not (bundle.path / "schedules").exists()


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


def test_the_folder_one_is_in_is_no_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_replaceable(Path(), force=True)
    with pytest.raises(OutputError, match=r"\. exists; pass --force"):
        check_replaceable(Path(), force=False)


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
