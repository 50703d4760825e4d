"""Options shared by the pipeline's commands."""

from pathlib import Path

import pytest

from pipeline.commands.options import repository_of
from pipeline.params.operation import RetrainParams
from pipeline.shared.artifacts import REPOSITORY
from serving.commands import options as served
from tests.support.making import ROOT


def test_a_command_is_about_what_was_given_then_what_retraining_promoted_then_what_repro_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = Path("params.yaml")
    assert repository_of(Path("mine"), params) == Path("mine")
    assert repository_of(None, params) == REPOSITORY
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    params.write_text(text, encoding="utf-8")
    assert repository_of(None, params) == REPOSITORY
    Path("releases").mkdir()
    assert repository_of(None, params) == Path("releases")
    params.write_text(text.replace("  repository: releases", "  repository: prod"), encoding="utf-8")
    assert repository_of(None, params) == REPOSITORY
    Path("prod").mkdir()
    assert repository_of(None, params) == Path("prod")
    params.unlink()
    assert repository_of(None, params) == Path("releases")


def test_what_the_recipe_calls_its_repositories_is_what_the_commands_of_serving_look_for() -> None:
    assert Path(RetrainParams().repository) == served.RELEASES
    assert REPOSITORY == served.REPOSITORY
