"""A key and signed exports for tests."""

from __future__ import annotations

from pathlib import Path

from serving.repository.manifest import MANIFEST_NAME, read_manifest
from serving.repository.signed_release import sign_export
from serving.repository.signing_keys import PublicKey, new_key, read_private_key
from serving.repository.writer import runtime_sha256


class Signer:
    """A new key pair in a folder, and what it signs."""

    def __init__(self, folder: Path, name: str = "release.pem") -> None:
        self.path = folder / name
        self.public: PublicKey = new_key(self.path)

    def sign(self, export: Path) -> Path:
        """Add the hashes of Tailor's files to the manifest of an export, as stage export does, and sign it."""
        manifest = read_manifest(export).model_copy(update={"runtime": runtime_sha256()})
        (export / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        sign_export(export, read_private_key(self.path))
        return export
