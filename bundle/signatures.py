"""Signed bundles: what is loaded is what the owner of a key has signed.

The signature is Ed25519's (RFC 8032) of the bytes of manifest.json, 64 bytes in `manifest.json.sig`. The manifest has
the hash of every file, and no file is used before its hash is checked, so the signature vouches for all of them. Keys
are PEM files as OpenSSL writes them, and `openssl pkeyutl -verify -rawin` checks the same signature.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from cat_pruning.errors import BundleError, SettingsError
from cat_pruning.files import open_file, read_bytes, write_whole
from cat_pruning.installation import require

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_NAME: Final = "manifest.json.sig"
_SIGNATURE_BYTES: Final = 64
_MAKE_PRIVATE: Final = "openssl genpkey -algorithm ed25519 -out FILE"
_MAKE_PUBLIC: Final = "openssl pkey -in PRIVATE -pubout -out FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """A key that bundles must be signed with."""

    file: Path
    key: Ed25519PublicKey

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Self:
        """The key in a PEM file.

        Raises:
            InstallationError: the package cryptography is not installed.
            SettingsError: the file has no public Ed25519 key, or cannot be read.
        """
        require("a public key", "sign")
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        path = Path(file)
        key = _key(path, "public", _MAKE_PUBLIC, load_pem_public_key)
        if not isinstance(key, Ed25519PublicKey):
            raise SettingsError(f"{path} has a key of another kind, expected Ed25519's", f"make one: {_MAKE_PRIVATE}")
        return cls(file=path, key=key)

    def check(self, place: Path | str, manifest: bytes, signature: bytes | None) -> None:
        """Check that a bundle's manifest is signed with this key's private half.

        Args:
            place: of the bundle, for errors.
            manifest: the bytes of its manifest, of which nothing has been read yet.
            signature: the bytes of its signature; None where it has none.

        Raises:
            BundleError: it is not.
        """
        from cryptography.exceptions import InvalidSignature

        remedy = "take the bundle that was signed, or sign this one if it is yours: cat-bundle sign "
        remedy += f"{place if isinstance(place, Path) else 'BUNDLE'} --key FILE"
        if signature is None:
            raise BundleError(
                f"{place} is not signed: it has no {SIGNATURE_NAME}, and {self.file} was given as the key", remedy
            )
        try:
            self.key.verify(signature, manifest)
        except InvalidSignature:
            raise BundleError(
                f"{place} is not signed with the key of {self.file}, or was changed after it was signed", remedy
            ) from None


def read_private_key(file: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file.

    Raises:
        InstallationError: the package cryptography is not installed.
        SettingsError: the file has no private Ed25519 key, one with a passphrase, or cannot be read.
    """
    require("cat-bundle sign", "sign")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = _key(file, "private", _MAKE_PRIVATE, lambda content: load_pem_private_key(content, None))
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsError(f"{file} has a key of another kind, expected Ed25519's", f"make one: {_MAKE_PRIVATE}")
    return key


def read_signature(directory: Path) -> bytes | None:
    """The signature of a bundle; None where it has none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with open_file(directory / SIGNATURE_NAME) as file:
            return file.read(_SIGNATURE_BYTES + 1)
    except FileNotFoundError:
        return None


def write_signature(directory: Path, manifest: bytes, key: Ed25519PrivateKey) -> None:
    """Sign a bundle: put the signature of its manifest's bytes beside the manifest.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(directory / SIGNATURE_NAME, key.sign(manifest))


def _key(file: Path, kind: str, command: str, load: Any) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load(read_bytes(file))
    except TypeError as error:  # as the library says it
        raise SettingsError(
            f"{file} has a key with a passphrase", f"take it off, into another file: openssl pkey -in {file} -out FILE"
        ) from error
    except OSError as error:
        raise SettingsError(f"{file} cannot be read ({error.strerror or error})", "give another file") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"{file} has no {kind} key in PEM", f"make one: {command}") from error
