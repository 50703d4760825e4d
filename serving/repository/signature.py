"""The signature of a manifest (manifest.json.sig): make it, read it, verify it with the trusted keys.

It covers the bytes of manifest.json as they were signed. A repository numbers its versions itself, so a published
manifest differs from the signed one in its version number and in nothing else; the signature file has the signed number.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.repository.manifest import MANIFEST_NAME, Manifest, ManifestError, read_manifest
from serving.repository.signing_keys import PublicKey, public_key_of, trusted_source

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURE_NAME = f"{MANIFEST_NAME}.sig"
LARGEST_BYTES = 1024  # of a signature file; a whole one has about 180
VERSION = re.compile(rb'("version":\s*)\d+')


class SignatureError(ManifestError):
    """A release is not signed by a trusted key, or is not what was signed; the message names the file."""


class Signature(BaseModel):
    """The content of a signature file.

    key: id of the public key. version: the version number in the signed manifest. signature: 64 bytes in base64.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    version: Annotated[int, Field(ge=1)]
    signature: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{85}[AQgw]==$")]

    def text(self) -> str:
        """The only accepted form of the file, so that each changed byte is detected."""
        return self.model_dump_json(indent=2) + "\n"


def renumbered(manifest: bytes, version: int) -> bytes:
    """The text of a manifest with another version number. All other bytes are unchanged."""
    return VERSION.sub(lambda match: match[1] + str(version).encode(), manifest, count=1)


def sign_manifest(folder: Path, key: Ed25519PrivateKey) -> Signature:
    """Sign manifest.json of a folder as it is. Raises ManifestError if it is not a manifest that can be numbered."""
    manifest, data = read_manifest(folder), (folder / MANIFEST_NAME).read_bytes()
    number = manifest.version + 1
    if Manifest.model_validate_json(renumbered(data, number)).version != number:
        raise ManifestError(f'{folder / MANIFEST_NAME}: its first "version" is not the release\'s; export again')
    signed = base64.b64encode(key.sign(data)).decode()
    return Signature(key=public_key_of(key).id, version=manifest.version, signature=signed)


def read_signature(folder: Path) -> Signature:
    """Read the signature file of a folder. Raises SignatureError if it is missing or damaged."""
    path = folder / SIGNATURE_NAME
    try:
        with path.open("rb") as stream:
            data = stream.read(LARGEST_BYTES)
    except FileNotFoundError:
        raise SignatureError(
            f"{path}: no such file; the release is not signed, and {trusted_source()} lists keys: `tailor keys sign`"
        ) from None
    except OSError as error:
        raise SignatureError(f"{path}: {error.strerror}; copy the release again") from None
    try:
        signature = Signature.model_validate_json(data)
    except ValidationError:
        raise SignatureError(f"{path}: is damaged; copy the release again, or sign it again") from None
    if signature.text().encode() != data:
        raise SignatureError(f"{path}: is damaged; copy the release again, or sign it again")
    return signature


def verify_manifest(folder: Path, trusted: Sequence[PublicKey], published: bool = False) -> PublicKey:
    """Verify the signature of manifest.json in a folder; returns the trusted key that signed it.

    published: whether the folder is a version of a repository, whose number may differ from the signed one; the caller
    then compares it with the folder's name. Raises SignatureError: no signature, a damaged one, an unknown key, or a
    manifest that differs from the signed one.
    """
    signature, path = read_signature(folder), folder / MANIFEST_NAME
    keys = {key.id: key for key in trusted}
    if signature.key not in keys:
        raise SignatureError(
            f"{folder / SIGNATURE_NAME}: is of key {signature.key}; {trusted_source()} lists {', '.join(keys)}; sign "
            "the release with one of these, or add its key"
        )
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SignatureError(f"{path}: {error.strerror}; copy the release again") from None
    signed, value = renumbered(text, signature.version), base64.b64decode(signature.signature)
    if not (published or signed == text) or not keys[signature.key].verifies(value, signed):
        raise SignatureError(
            f"{path}: is not what key {signature.key} signed; copy the release again from where it was made"
        )
    return keys[signature.key]
