"""A bundle as it is opened and verified."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from bundle_files import STEP, edit, names

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.manifest import MANIFEST_NAME, Manifest
from cat_pruning.errors import BundleError

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
    with pytest.raises(BundleError, match=r"not a bundle, or an export that was interrupted; give the directory"):
        Bundle.open(bundle.path)


def test_another_format_version(bundle: Bundle) -> None:
    path = bundle.path / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))
    with pytest.raises(BundleError, match=r"format version 9, .* version 8; .* cat-export --model some/sd3 --out"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("version", "later"),
    [(6, ("components", "quantization", "calibration", "unquantized")), (7, ("calibration", "unquantized"))],
)
def test_a_bundle_of_before_there_were_some_fields(bundle: Bundle, version: int, later: tuple[str, ...]) -> None:
    path = bundle.path / MANIFEST_NAME
    fields = json.loads(path.read_text()) | {"format_version": version}
    for name in later:
        del fields[name]
    for name in {"components", "quantization"} - set(later):  # which are left out where they say nothing
        fields.pop(name)
    path.write_text(json.dumps(fields))
    manifest = Bundle.open(bundle.path).manifest
    assert manifest.components == ()
    # Results and schedules that were made with it name its digest, of a manifest without such a field.
    added = {*manifest.schedules, *(plan.file for plan in manifest.plans)}
    files = {name: spec for name, spec in fields["files"].items() if name not in added}
    left = json.dumps(
        fields | {"schedules": [], "plans": [], "files": files}, separators=(",", ":"), ensure_ascii=False
    )
    assert manifest.digest == hashlib.sha256(left.encode()).hexdigest()


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


def test_of_many_files_that_were_added_three_are_named(bundle: Bundle) -> None:
    for number in range(50):
        (bundle.path / "pipeline" / f"added-{number:02d}").touch()
    with pytest.raises(BundleError, match=r"added-00, \S+-01, \S+-02 and 47 more added after the export; remove that"):
        bundle.verified_tree("pipeline")


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
