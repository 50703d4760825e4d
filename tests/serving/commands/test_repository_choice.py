"""Default repository of a command: promoted releases, or the repository written by `dvc repro`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import picture, write_export

from serving.client.sync_client import Client
from serving.commands import main
from serving.commands.options import RELEASES, REPOSITORY, choose_repository
from serving.promotion.promotion import promote
from serving.repository.release import list_versions
from serving.repository.writer import write_repository

NOTE = (
    "tailor: artifacts/repository, which `dvc repro` wrote, holds a model that has not been promoted; --repository is "
    "releases, what was promoted\n"
)


@pytest.fixture
def project(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project after a retraining: version 2 of `releases` is the champion, `artifacts/repository` has version 1."""
    monkeypatch.chdir(tmp_path)
    for folder in (REPOSITORY, RELEASES):
        shutil.copytree(repository, folder)
    write_export(Path("second"), version=2)
    promote(RELEASES, Path("second"), servers=[], rehearsal=False)


def champion_of(repository: Path) -> int:
    (champion,) = (state.version for state in list_versions(repository) if state.state == "champion")
    return champion


def test_the_repository_is_the_option_then_the_promoted_releases_then_that_of_repro(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_repository(None) == REPOSITORY
    RELEASES.mkdir()
    assert choose_repository(None) == RELEASES
    assert choose_repository(Path("mine")) == Path("mine")
    assert capsys.readouterr() == ("", "")  # only one exists
    REPOSITORY.mkdir(parents=True)
    assert choose_repository(Path("mine")) == Path("mine")
    assert choose_repository(None, REPOSITORY) == choose_repository(None, Path("prod")) == REPOSITORY
    assert capsys.readouterr() == ("", "")  # unambiguous
    assert choose_repository(None, note=True) == RELEASES
    assert capsys.readouterr() == ("", "")  # it contains no model


def test_a_note_on_an_unpromoted_model_is_printed_only_with_note(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (REPOSITORY, RELEASES):
        shutil.copytree(repository, folder)
    assert choose_repository(None, note=True) == RELEASES
    assert capsys.readouterr() == ("", "")  # that model is the champion
    shutil.rmtree(REPOSITORY)
    write_export(Path("second"), version=2)
    write_repository(Path("second"), REPOSITORY)
    assert choose_repository(None) == RELEASES
    assert capsys.readouterr() == ("", "")  # like all commands except serve
    assert choose_repository(None, note=True) == RELEASES
    assert capsys.readouterr() == ("", NOTE)


@pytest.mark.parametrize("folder", [None, RELEASES], ids=["missing", "empty"])
def test_the_error_of_serve_without_a_promoted_release_names_the_commands_to_run(
    folder: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if folder:
        folder.mkdir()
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == (
        f"tailor: {folder or REPOSITORY}: holds no student/config.pbtxt, nothing has been promoted yet; "
        "run `dvc repro`, then `tailor promote artifacts/export`, or give --repository\n"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("project")
def test_versions_lists_the_promoted_releases_as_plain_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["versions", "--json"]) == 0
    printed = capsys.readouterr()
    assert [entry["version"] for entry in json.loads(printed.out)] == [1, 2] and printed.err == ""
    assert main(["versions", "--json", "--repository", "artifacts/repository"]) == 0
    printed = capsys.readouterr()
    assert [entry["version"] for entry in json.loads(printed.out)] == [1] and printed.err == ""


@pytest.mark.slow
@pytest.mark.usefixtures("project")
def test_promote_and_rollback_change_only_the_promoted_releases(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.stat().st_mtime_ns for path in REPOSITORY.rglob("*")}
    assert main(["rollback", "--no-rehearsal"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("version 1 answers instead of 2") and printed.err == ""
    assert champion_of(RELEASES) == 1
    write_export(Path("artifacts/export"), version=3)
    assert main(["promote", "--no-rehearsal", "--json", "--force"]) == 0  # its manifest has no figures
    printed = capsys.readouterr()
    assert json.loads(printed.out)["version"] == 3 and "artifacts/repository" not in printed.err
    assert champion_of(RELEASES) == 3
    assert {path: path.stat().st_mtime_ns for path in REPOSITORY.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.usefixtures("project")
def test_serve_starts_with_the_promoted_release() -> None:
    command = [sys.executable, "-m", "serving.commands", "serve", "--quiet"]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        ready = process.stdout.readline()
        assert ready, process.communicate()[1]
        _, http, _ = ready.split()
        assert process.stdout.readline().startswith("metrics http://")
        assert process.stdout.readline() == "repository releases\n"
        with Client(http) as client:
            assert client.predict([picture(1)])[0].version == 2
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
