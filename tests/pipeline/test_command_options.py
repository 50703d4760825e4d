"""Options that the pipeline's commands share."""

from pathlib import Path

import pytest
from making import ROOT

from pipeline.artifacts import REPOSITORY
from pipeline.commands.options import repository_of


def test_a_command_is_about_what_was_given_then_what_retraining_promoted_then_what_repro_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = Path("params.yaml")
    assert repository_of(Path("mine"), params) == Path("mine")
    assert repository_of(None, params) == REPOSITORY
    params.write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert repository_of(None, params) == REPOSITORY
    Path("releases").mkdir()
    assert repository_of(None, params) == Path("releases")
