"""Signed bundles: what is refused, and before what."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_files import edit, export, names, plan_set, small_manifest
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from signing_keys import private_pem, public_pem, write_keys

from cat_pruning.bundle import bundle as bundle_module
from cat_pruning.bundle.bundle import Bundle, check_replaceable
from cat_pruning.bundle.changes import Change, change_bundle, sign_bundle
from cat_pruning.bundle.manifest import MANIFEST_NAME
from cat_pruning.bundle.signatures import SIGNATURE_NAME, PublicKey, read_private_key
from cat_pruning.errors import BundleError, OutputError, SettingsError


@pytest.fixture
def private(tmp_path: Path) -> Path:
    return write_keys(tmp_path)[0]


@pytest.fixture
def public(private: Path) -> PublicKey:
    return PublicKey.read(private.with_name("key.public.pem"))


@pytest.fixture
def signed(bundle: Bundle, private: Path) -> Bundle:
    sign_bundle(bundle, private)
    return bundle


def test_signed_it_is_opened_with_the_key_and_without(signed: Bundle, public: PublicKey) -> None:
    assert Bundle.open(signed.path, public) == Bundle.open(signed.path) == signed
    assert len((signed.path / SIGNATURE_NAME).read_bytes()) == 64


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_openssl_checks_the_same_signature(bundle: Bundle, tmp_path: Path) -> None:
    """With keys that it has made: nobody has to believe this code."""

    def openssl(*arguments: object) -> str:
        command = ["openssl", *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    openssl("genpkey", "-algorithm", "ed25519", "-out", private)
    openssl("pkey", "-in", private, "-pubout", "-out", public)
    sign_bundle(bundle, private)
    Bundle.open(bundle.path, PublicKey.read(public))
    files = ("-in", bundle.path / MANIFEST_NAME, "-sigfile", bundle.path / SIGNATURE_NAME)
    assert "Verified Successfully" in openssl("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", *files)


def unsigned(bundle: Bundle) -> None:
    (bundle.path / SIGNATURE_NAME).unlink()


def edited(bundle: Bundle) -> None:
    """Another manifest, which holds by itself."""
    content = (bundle.path / MANIFEST_NAME).read_text().replace('"torch": "2.13.0"', '"torch": "2.13.1"')
    (bundle.path / MANIFEST_NAME).write_text(content)
    assert Bundle.open(bundle.path) != bundle


def not_json(bundle: Bundle) -> None:
    (bundle.path / MANIFEST_NAME).write_text("[" * 100_000)


def truncated(bundle: Bundle) -> None:
    (bundle.path / SIGNATURE_NAME).write_bytes((bundle.path / SIGNATURE_NAME).read_bytes()[:63])


def too_long(bundle: Bundle) -> None:
    (bundle.path / SIGNATURE_NAME).write_bytes((bundle.path / SIGNATURE_NAME).read_bytes() * 1000)


def of_another_key(bundle: Bundle) -> None:
    sign_bundle(bundle, write_keys(bundle.path.parent, "other")[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (unsigned, "is not signed: it has no manifest.json.sig"),
        (edited, "is not signed with the key of"),
        (not_json, "is not signed with the key of"),
        (truncated, "is not signed with the key of"),
        (too_long, "is not signed with the key of"),
        (of_another_key, "is not signed with the key of"),
    ],
)
def test_refused_by_a_line_before_anything_of_it_is_read(
    signed: Bundle,
    public: PublicKey,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Bundle], None],
    said: str,
) -> None:
    change(signed)
    monkeypatch.setattr("cat_pruning.bundle.manifest.parse_manifest", lambda *_: pytest.fail("was read"))
    monkeypatch.setattr(bundle_module, "_sha256", lambda *_: pytest.fail("a file was read"))
    with pytest.raises(BundleError) as caught:
        Bundle.open(signed.path, public)
    assert said in caught.value.problem
    assert str(public.file) in caught.value.problem
    assert caught.value.remedy.endswith(f"cat-bundle sign {signed.path} --key FILE")


def test_a_file_that_was_edited_is_refused_when_it_is_used(signed: Bundle, public: PublicKey) -> None:
    edit(signed.path / "step.onnx")
    with pytest.raises(BundleError, match=r"step\.onnx was changed after the export"):
        Bundle.open(signed.path, public).verified("step.onnx")


def test_what_changes_it_takes_the_signature_off(
    signed: Bundle, public: PublicKey, caplog: pytest.LogCaptureFixture
) -> None:
    change_bundle(signed.path, lambda manifest: Change(fields={}))
    assert caplog.messages == []
    Bundle.open(signed.path, public)
    plan = plan_set("tensorrt", "11.4", "sm90")[0]
    change_bundle(signed.path, lambda manifest: Change(fields={"plans": (plan,)}, added={plan.file: b"a plan"}))
    assert caplog.messages == [
        f"{signed.path} was changed and is no longer signed: cat-bundle sign {signed.path} --key FILE"
    ]
    assert SIGNATURE_NAME not in names(signed.path)
    with pytest.raises(BundleError, match="is not signed"):
        Bundle.open(signed.path, public)


def test_a_new_export_replaces_it_with_its_signature(signed: Bundle) -> None:
    check_replaceable(signed.path, force=True)
    export(signed.path, small_manifest(), force=True, step=b"second")
    assert SIGNATURE_NAME not in names(signed.path)


def test_what_was_changed_since_it_was_verified_is_not_signed(bundle: Bundle, private: Path) -> None:
    plan = plan_set("tensorrt", "11.4", "sm90")[0]
    change_bundle(bundle.path, lambda manifest: Change(fields={"plans": (plan,)}, added={plan.file: b"a plan"}))
    with pytest.raises(BundleError, match="was changed while it was verified; sign it again"):
        sign_bundle(bundle, private)
    assert SIGNATURE_NAME not in names(bundle.path)


def test_a_bundle_that_cannot_be_written(bundle: Bundle, private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("cat_pruning.bundle.changes.write_signature", fails)
    with pytest.raises(OutputError, match=r"cannot be written \(Read-only file system\)"):
        sign_bundle(bundle, private)


# ------------------------------------------------------------------ keys

KEY = Ed25519PrivateKey.generate()
ED448 = Ed448PrivateKey.generate()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no private key in PEM; make one: openssl genpkey -algorithm ed25519 -out FILE"),
        (b"\x00\xff" * 40, "has no private key in PEM"),
        (public_pem(KEY), "has no private key in PEM"),
        (private_pem(KEY, b"secret"), "has a key with a passphrase; take it off, into another file: openssl pkey -in "),
        (private_pem(ED448), "has a key of another kind, expected Ed25519's; make one: openssl genpkey"),
        (None, r"cannot be read \(No such file or directory\); give another file"),
    ],
)
def test_a_private_key_that_is_none(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "key.pem").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"key\.pem {said}"):
        read_private_key(tmp_path / "key.pem")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"-----BEGIN PUBLIC KEY-----\n", "has no public key in PEM; make one: openssl pkey -in PRIVATE -pubout -out"),
        (private_pem(KEY), "has no public key in PEM"),
        (public_pem(ED448), "has a key of another kind, expected Ed25519's"),
        (None, "cannot be read"),
    ],
)
def test_a_public_key_that_is_none(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "key.pem").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"key\.pem {said}"):
        PublicKey.read(tmp_path / "key.pem")
