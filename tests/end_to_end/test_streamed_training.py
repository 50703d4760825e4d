"""A streamed run by the true command: stopped and killed, it leaves no process and ends with the bits of one from memory."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.end_to_end.project import Project

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("killed"), pytest.mark.timeout(1200)]

SMALL = {
    "teacher": {"epochs": 6, "backbone": "resnet20", "batch_size": 16},
    "image": {"size": 8, "resize_to": 8},
    "engine": {"checkpoint_seconds": 0},
}


def end(project: Project, how: signal.Signals) -> int:
    """Start the stage, send it a signal after its first epoch; its exit code. Nothing of its process group is left."""
    running = subprocess.Popen(
        ["python", "-u", "-m", "pipeline.teacher"],
        cwd=project.root,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    line = next(line for line in running.stdout if "epoch" in line)
    assert "validation" in line
    running.send_signal(how)
    code = running.wait(60)
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)
    return code


def test_a_streamed_run_that_is_interrupted_and_killed_ends_as_one_from_memory(tmp_path):
    project, weights = Project(tmp_path), tmp_path / "artifacts/teacher/model.safetensors"
    project.set({**SMALL, "stream": {"mode": "off"}})
    for stage in ("split", "prior", "teacher"):
        project.run("python", "-m", f"pipeline.{stage}")
    held = weights.read_bytes()
    weights.unlink()
    project.set({"stream": {"mode": "on", "workers": 3}})
    assert end(project, signal.SIGINT) == 130
    assert end(project, signal.SIGKILL) == -signal.SIGKILL
    done = project.run("python", "-m", "pipeline.teacher")
    assert "teacher  goes on at step" in done.stdout
    assert weights.read_bytes() == held
