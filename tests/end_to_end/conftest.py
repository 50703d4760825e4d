"""Fixtures of the end-to-end tests: a project shared by several tests and trained once."""

from __future__ import annotations

import pytest

from tests.support.project import SHORT, Project


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A project on the embedded data; one `dvc repro` trained both networks for 12 epochs. Read-only for tests."""
    project = Project(tmp_path_factory.mktemp("digits") / "project")
    project.set(SHORT)
    project.commit()
    project.first = project.run("dvc", "repro")
    return project
