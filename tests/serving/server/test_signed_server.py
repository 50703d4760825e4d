"""A real server with trusted keys: it serves signed releases, also those promoted while it runs, and refuses others."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Release, picture, write_export

from serving.client.sync_client import Client
from serving.promotion.promotion import promote, rollback
from serving.repository.signature import SIGNATURE_NAME, SignatureError
from serving.repository.signing_keys import TRUSTED_VARIABLE
from serving.repository.writer import write_repository
from serving.server.triton_server import TritonServer
from serving.shared.errors import ServingError
from tests.support.signed import Signer

pytestmark = pytest.mark.end_to_end


def test_a_server_serves_what_a_trusted_key_signed_and_nothing_else(
    exports: dict[int, Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = Signer(tmp_path)
    folders = [tmp_path / "first", tmp_path / "second"]
    for version, folder in enumerate(folders, start=1):
        write_export(folder, version)
        signer.sign(folder)
    root = write_repository(folders[0], tmp_path / "repository")
    monkeypatch.setenv(TRUSTED_VARIABLE, f"{signer.path}.pub")
    server = TritonServer(root, http_port=0, grpc_port=0, metrics_port=0)

    def champion() -> int:
        with Client(server.http_url) as client:
            return client.predict([picture(3)])[0].version

    with server:
        assert champion() == 1
        with pytest.raises(SignatureError, match="the release is not signed"):
            promote(root, exports[3].export_dir)
        assert champion() == 1
        done = promote(root, folders[1])
        assert (done.version, done.rehearsed, champion()) == (2, True, 2)
        # Version 1 is still loaded; without its signature a rollback to it is refused.
        signature = root / "classifier/1" / SIGNATURE_NAME
        content = signature.read_bytes()
        signature.unlink()
        with pytest.raises(SignatureError, match=str(signature)):
            rollback(root)
        assert champion() == 2
        signature.write_bytes(content)
        assert rollback(root).version == champion() == 1
    code = root / "classifier/1/model.py"
    text = code.read_bytes()
    code.write_bytes(text + b"import os\n")
    with pytest.raises(ServingError, match=rf"{code}: sha256 is"):
        server.start()
    assert server.process_id is None
    code.write_bytes(text)
    monkeypatch.setenv(TRUSTED_VARIABLE, Signer(tmp_path, "other.pem").public.base64)
    with pytest.raises(SignatureError, match=f"is of key {signer.public.id}"):
        server.start()
    assert server.process_id is None
