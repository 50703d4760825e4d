"""DVC killed during training: no training process remains, and the next `dvc repro` resumes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.project import Project

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("killed"), pytest.mark.timeout(1200)]

# A wrapper process between DVC and the stage, like a shell that does not exec its last command.
FORKING_SHELL = '#!/bin/sh\n/bin/sh "$@"\nexit $?\n'


def stages_of(root: Path) -> list[psutil.Process]:
    """Return the processes that run a stage of the project."""
    stages = []
    for process in psutil.process_iter():
        with contextlib.suppress(
            psutil.Error, FileNotFoundError
        ):  # it ended meanwhile; psutil's cwd() raises the latter
            module = "pipeline.teacher" in process.cmdline() and process.cwd() == str(root)
            if module and process.status() != psutil.STATUS_ZOMBIE:
                stages.append(process)
    return stages


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project whose teacher training takes minutes."""
    running_project = Project(tmp_path_factory.mktemp("owned") / "project")
    running_project.set({"teacher": {"epochs": 400, "backbone": "resnet20"}, "image": {"size": 8, "resize_to": 8}})
    running_project.commit()
    yield running_project
    for process in stages_of(running_project.root):
        process.kill()


@pytest.mark.parametrize(
    ("number", "launch", "shell"),
    [
        (signal.SIGTERM, None, "/bin/bash"),
        (signal.SIGKILL, None, "/bin/bash"),
        (signal.SIGTERM, None, FORKING_SHELL),
        (signal.SIGKILL, "torchrun --nproc-per-node 1", FORKING_SHELL),
    ],
    ids=["sigterm", "sigkill", "sigterm, a shell between", "sigkill, torchrun between"],
)
def test_training_ends_when_dvc_is_killed_and_the_next_repro_resumes_it(
    project: Project, tmp_path: Path, number: signal.Signals, launch: str | None, shell: str
) -> None:
    if shell == FORKING_SHELL:
        (tmp_path / "shell").write_text(shell)
        (tmp_path / "shell").chmod(0o755)
        shell = str(tmp_path / "shell")
    environment = {**project.environment, "SHELL": shell, "PYTHONUNBUFFERED": "1"}
    environment |= {"TAILOR_LAUNCH": launch} if launch else {}
    log = tmp_path / "log"
    with log.open("w") as output:
        dvc = subprocess.Popen(
            ["dvc", "repro", "teacher"], cwd=project.root, env=environment, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            wait_until(lambda: "teacher  epoch" in log.read_text(), 300, log)
            assert stages_of(project.root)
            dvc.send_signal(number)
            dvc.wait()
            wait_until(lambda: not stages_of(project.root), 15, log)
        finally:
            if dvc.poll() is None:
                os.killpg(dvc.pid, signal.SIGKILL)
            dvc.wait()
    assert "has exited; `dvc repro` resumes it" in log.read_text()
    after = tmp_path / "after"
    with after.open("w") as output:
        second = subprocess.Popen(
            ["dvc", "repro", "teacher"], cwd=project.root, env=project.environment | {"PYTHONUNBUFFERED": "1"},
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        try:
            wait_until(lambda: "teacher  resumes at step" in after.read_text(), 300, after)
            assert len(stages_of(project.root)) == 1
        finally:
            os.killpg(second.pid, signal.SIGKILL)
            second.wait()


def wait_until(holds, seconds: float, log: Path) -> None:
    """Wait until a condition holds; fail with the log after a timeout."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
