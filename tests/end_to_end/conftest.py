"""Projects that several tests look at, trained once."""

from __future__ import annotations

import pytest

from tests.support.project import SHORT, Project


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The embedded data, trained for twelve epochs each by one `dvc repro`. Tests leave it as they find it."""
    project = Project(tmp_path_factory.mktemp("digits") / "project")
    project.set(SHORT)
    project.commit()
    project.first = project.run("dvc", "repro")
    return project
