"""Options shared by the pipeline's commands."""

from pathlib import Path

import pytest

from pipeline.commands.options import repository_of
from pipeline.params.operation import RetrainParams
from pipeline.shared.artifacts import REPOSITORY
from serving.commands import options as serving_options
from tests.support.making import ROOT


def test_the_repository_is_the_argument_then_the_promoted_then_the_default_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = Path("params.yaml")
    assert repository_of(Path("argument"), params) == Path("argument")
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


def test_the_default_repositories_of_params_and_serving_are_equal() -> None:
    assert Path(RetrainParams().repository) == serving_options.RELEASES
    assert REPOSITORY == serving_options.REPOSITORY
