"""Commands of the documentation that take minutes; `make test-docs` runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.documentation.conftest import LESS_LOAD, commands_of, has_nginx
from tests.support.documented import ROOT
from tests.support.project import Project
from tests.support.reader import Reader

pytestmark = [pytest.mark.end_to_end, pytest.mark.docs_commands, pytest.mark.timeout(1800)]

own_group = pytest.mark.xdist_group("own images")


@own_group
def test_the_load_tests_of_the_page_on_serving(own: Project) -> None:
    reader = Reader(own, LESS_LOAD)
    try:
        reader.type("tailor serve")
        for command in commands_of("docs/serving.md", "tailor loadtest"):
            # On a busy machine a threshold may be missed (status 1), which is not an error of the page.
            printed = reader.type(command, expect=(0, 1))
            assert "p99 ms" in printed and "reports in artifacts/loadtest" in printed
    finally:
        reader.close()


@own_group
def test_the_retraining_of_the_page_on_new_images(own: Project) -> None:
    for command in commands_of("docs/new-images.md", "dvc repro"):
        assert "teacher" in own.stages_run(own.run(*command.split(), "--force"))


@own_group
def test_a_stage_on_two_workers_of_ray(own: Project) -> None:
    (command,) = commands_of("docs/many-machines.md", "tailor ray-train student --workers 2")
    own.set({"student": {"batch_size": 16}})
    assert "artifacts/student" in Reader(own).type(command)


def test_the_retraining_demo(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    shutil.copyfile(ROOT / "Makefile", project.root / "Makefile")
    printed = Reader(project).type("make retrain-demo")
    assert "one promoted, one refused" in printed
    experiments = printed.partition("$ tailor experiments")[2]
    assert re.search(r"retrain-\d{8}-\d{6}-promoted-1", experiments)
    assert re.search(r"retrain-\d{8}-\d{6}-refused", experiments)


def test_ten_thousand_hostile_requests(tmp_path: Path) -> None:
    (command,) = commands_of("docs/security.md", "TAILOR_HOSTILE_REQUESTS")
    report = tmp_path / "hostile.md"
    text = command.replace("hostile.md", str(report), 1)
    subprocess.run(["bash", "-c", f"{text} -q"], cwd=ROOT, check=True, timeout=1700, env=project_path())
    assert report.stat().st_size > 0 or not has_nginx()


def project_path() -> dict[str, str]:
    """Return the environment with this interpreter's bin folder first on PATH."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
