"""`tailor keys`: the commands of docs/signed-releases.md in their order, and their errors."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import Release, write_export

from pipeline.commands.app import main
from serving.repository.signature import SIGNATURE_NAME
from serving.repository.signing_keys import KEY_VARIABLE, PASSPHRASE_VARIABLE, TRUSTED_VARIABLE
from serving.repository.writer import write_repository
from tests.support.documented import ROOT, commands
from tests.support.signed import Signer

PAGE = ROOT / "docs/signed-releases.md"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (KEY_VARIABLE, PASSPHRASE_VARIABLE, TRUSTED_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command line of the form NAME=VALUE tailor ... in this process."""
    words = shlex.split(command)
    with monkeypatch.context() as patch:
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            patch.setenv(name, value)
        assert words.pop(0) == "tailor"
        return main(words)


def test_the_page_leads_to_a_signed_repository(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export = project / "artifacts/export"
    write_export(export)
    Signer(project, "another.pem").sign(export)
    (export / SIGNATURE_NAME).unlink()
    new, sign, verify, again = commands(PAGE)
    assert run(new, monkeypatch) == 0
    assert run(sign, monkeypatch) == 0
    write_repository(export, project / "artifacts/repository")
    assert run(verify, monkeypatch) == 0
    assert run(verify.replace("repository", "export"), monkeypatch) == 0
    shutil.copytree(project / "artifacts/repository", project / "releases")
    assert run("tailor keys new new.pem", monkeypatch) == 0
    assert run(again, monkeypatch) == 0
    capsys.readouterr()
    assert run("TAILOR_TRUSTED_KEYS=new.pem.pub tailor keys verify releases", monkeypatch) == 0
    assert run("TAILOR_TRUSTED_KEYS=release.pem.pub tailor keys verify releases", monkeypatch) == 1
    assert "version 1: refused: " in capsys.readouterr().out
    monkeypatch.setenv(TRUSTED_VARIABLE, "release.pem.pub")
    assert run("tailor promote artifacts/export --repository releases --no-rehearsal", monkeypatch) == 0
    assert run("tailor keys verify releases", monkeypatch) == 0  # has the export's signature again


def test_a_private_key_is_never_printed(project: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "correct horse")
    assert run("tailor keys new release.pem", monkeypatch) == 0
    assert run("tailor keys show release.pem.pub", monkeypatch) == 0
    assert run("tailor keys show release.pem", monkeypatch) == 2
    printed = "".join(capsys.readouterr())
    secret = (project / "release.pem").read_text().splitlines()[1]
    assert secret not in printed
    assert "correct horse" not in printed
    assert printed.count("key ") >= 2


@pytest.mark.parametrize(
    ("command", "status", "part"),
    [
        ("tailor keys sign artifacts/export", 2, "TAILOR_SIGNING_KEY is not set"),
        ("tailor keys verify artifacts/export", 2, "no key is trusted"),
        ("TAILOR_SIGNING_KEY=absent.pem tailor keys sign artifacts/export", 2, "absent.pem: No such file"),
        ("TAILOR_TRUSTED_KEYS=absent.pub tailor keys verify artifacts/export", 2, "absent.pub: No such file"),
        ("TAILOR_TRUSTED_KEYS=release.pem.pub tailor keys verify artifacts/export", 1, "the release is not signed"),
        ("TAILOR_TRUSTED_KEYS=release.pem.pub tailor promote artifacts/export", 1, "the release is not signed"),
        ("TAILOR_SIGNING_KEY=release.pem tailor keys sign artifacts/export", 1, "lacks the key runtime"),
        ("TAILOR_SIGNING_KEY=open.pem tailor keys sign artifacts/export", 2, "chmod 600"),
        ("tailor keys new release.pem", 2, "exists and is not replaced"),
        ("tailor keys show release.pem", 2, "is not a public key"),
    ],
)
def test_an_error_is_one_line(
    project: Path,
    release: Release,
    monkeypatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    status: int,
    part: str,
) -> None:
    shutil.copytree(release.export_dir, project / "artifacts/export")
    write_repository(release.export_dir, project / "artifacts/repository")
    assert run("tailor keys new release.pem", monkeypatch) == 0
    shutil.copyfile("release.pem", "open.pem")
    os.chmod("open.pem", 0o644)  # noqa: PTH101
    capsys.readouterr()
    assert run(command, monkeypatch) == status
    printed = capsys.readouterr()
    assert printed.err.startswith("tailor: ")
    lines = [line for line in printed.err.splitlines() if line.startswith("tailor: ")]
    assert len(lines) == 1
    assert part in lines[0]
