"""Stage `export` signs its manifest with the key of TAILOR_SIGNING_KEY."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pipeline.embed
import pipeline.evaluate
import pipeline.export
import pipeline.prior
import pipeline.split
import pipeline.student
import pipeline.teacher
from pipeline.shared.artifacts import EXPORT, REPOSITORY
from serving.repository.manifest import MANIFEST_NAME
from serving.repository.release import find_releases
from serving.repository.signature import SIGNATURE_NAME, verify_manifest
from serving.repository.signing_keys import KEY_VARIABLE, TRUSTED_VARIABLE
from serving.repository.writer import runtime_sha256
from serving.shared.errors import InputError
from tests.support.making import folder
from tests.support.signed import Signer
from tests.support.small_encoder import tiny_encoder, tiny_params

STAGES = (pipeline.split, pipeline.prior, pipeline.embed, pipeline.teacher, pipeline.student, pipeline.evaluate)


@pytest.mark.slow
def test_the_export_and_its_repository_are_signed_and_the_trusted_keys_are_no_part_of_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = tiny_encoder(tmp_path, monkeypatch)
    changes = {"student.queue_total": 64}
    params = tiny_params(weights, folder(tmp_path / "images", {"a": 30, "b": 9}), changes)
    for stage in STAGES:
        stage.run(params)
    signer = Signer(tmp_path)
    signer.path.chmod(0o644)
    monkeypatch.setenv(KEY_VARIABLE, str(signer.path))
    with pytest.raises(InputError, match="chmod 600"):
        pipeline.export.run(params)
    assert not EXPORT.exists()
    signer.path.chmod(0o600)
    pipeline.export.run(params)
    assert verify_manifest(EXPORT, [signer.public]) == signer.public
    assert json.loads((EXPORT / MANIFEST_NAME).read_text())["runtime"] == runtime_sha256()
    monkeypatch.setenv(TRUSTED_VARIABLE, signer.public.base64)
    assert len(find_releases(REPOSITORY)) == 1
    signed = (EXPORT / MANIFEST_NAME).read_bytes()

    monkeypatch.delenv(KEY_VARIABLE)
    serving = params.serving.model_copy(update={"trusted_keys": [signer.public.base64]})
    pipeline.export.run(params.model_copy(update={"serving": serving}))
    assert not (EXPORT / SIGNATURE_NAME).exists()
    assert (EXPORT / MANIFEST_NAME).read_bytes() == signed
