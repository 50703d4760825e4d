"""Training that is killed at random moments, by the true commands, ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess

import pytest

from tests.end_to_end.project import Project

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("killed"), pytest.mark.timeout(3000)]

KILLS = 6  # of each stage
SMALL = {
    "teacher": {"epochs": 24, "backbone": "resnet20", "batch_size": 16},
    "student": {"epochs": 16, "backbone": "resnet20", "batch_size": 16, "queue_total": 64},
    "image": {"size": 8, "resize_to": 8},
}


def kill_stage(project: Project, stage: str, seconds: float) -> bool:
    """Start a training stage and kill it `seconds` after its first line; False if it had finished by then."""
    running = subprocess.Popen(
        ["python", "-u", "-m", f"pipeline.{stage}"],
        cwd=project.root,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    running.stdout.readline()
    try:
        running.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        return True


def test_twelve_kills_at_random_moments_change_no_bit_of_teacher_or_student(tmp_path):
    calm, killed = Project(tmp_path / "calm"), Project(tmp_path / "killed")
    for project in (calm, killed):
        project.set(SMALL)
        project.commit()
    calm.run("dvc", "repro", "student")
    killed.run("dvc", "repro", "prior")
    draw = random.Random(0)
    for stage in ("teacher", "student"):
        kills = sum(kill_stage(killed, stage, draw.uniform(0.0, 0.8)) for _ in range(KILLS))
        assert kills == KILLS, f"{stage} finished between the kills; give it more epochs"
        done = killed.run("dvc", "repro", stage)
        assert f"{stage}  goes on at step" in done.stdout
        weights = f"artifacts/{stage}/model.safetensors"
        assert (killed.root / weights).read_bytes() == (calm.root / weights).read_bytes()
    assert not list((killed.root / "artifacts").glob(".*.unfinished"))
