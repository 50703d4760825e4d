"""A folder with a model repository and a log of predictions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Release

from tests.support.drift_data import LIVE, drawn
from tests.support.logit_logs import write_log


@pytest.fixture
def own(repository: Path, tmp_path: Path) -> Path:
    """A folder with a repository in its default location, and a log of 2,000 predictions under LIVE."""
    shutil.copytree(repository, tmp_path / "artifacts/repository")
    return tmp_path


@pytest.fixture
def logged(own: Path, release: Release) -> Path:
    write_log(own / "artifacts/logits", release.manifest, drawn(LIVE, 2000)[1])
    return own / "artifacts/logits"
