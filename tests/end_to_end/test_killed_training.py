"""Training killed at random times, with the real commands: the resumed result is bit-identical."""

from __future__ import annotations

import os
import random
import signal
import subprocess

import pytest

from tests.support.project import Project

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("killed"), pytest.mark.timeout(3000)]

KILLS = 6  # per stage
SMALL = {
    "teacher": {"epochs": 24, "backbone": "resnet20", "batch_size": 16},
    "student": {"epochs": 16, "backbone": "resnet20", "batch_size": 16, "queue_total": 64},
    "image": {"size": 8, "resize_to": 8},
}


def kill_stage(project: Project, stage: str, seconds: float) -> bool:
    """Start a training stage and kill it `seconds` after its first line; return False if it finished before."""
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A project whose training was not interrupted."""
    project = Project(tmp_path_factory.mktemp("uninterrupted") / "uninterrupted")
    project.set(SMALL)
    project.commit()
    project.run("dvc", "repro", "student")
    return project


def kill_at_random(project: Project, stages: tuple[str, ...], uninterrupted: Project) -> None:
    """Kill each stage at random times, let it finish, and check that its weights equal the uninterrupted ones."""
    project.run("dvc", "repro", "prior")
    draw = random.Random(0)
    for stage in stages:
        kills = sum(kill_stage(project, stage, draw.uniform(0.0, 0.8)) for _ in range(KILLS))
        assert kills == KILLS, f"{stage} finished between the kills; give it more epochs"
        done = project.run("dvc", "repro", stage)
        assert f"{stage}  resumes at step" in done.stdout
        weights = f"artifacts/{stage}/model.safetensors"
        assert (project.root / weights).read_bytes() == (uninterrupted.root / weights).read_bytes()
    assert not list((project.root / "artifacts").glob(".*.unfinished"))


def test_training_killed_twelve_times_is_bit_identical(tmp_path, uninterrupted):
    killed = Project(tmp_path / "killed")
    killed.set(SMALL)
    killed.commit()
    kill_at_random(killed, ("teacher", "student"), uninterrupted)


def test_streamed_training_killed_at_random_is_bit_identical(tmp_path, uninterrupted):
    streamed = Project(tmp_path / "streamed")
    streamed.set({**SMALL, "stream": {"mode": "on", "decode": "exact", "workers": 2}})
    streamed.commit()
    kill_at_random(streamed, ("teacher",), uninterrupted)
