"""Distributed training with torchrun, by the command in dvc.yaml."""

from __future__ import annotations

import json

import pytest

from tests.support.project import SHORT, Project

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("torchrun")]


def test_dvc_repro_trains_on_two_processes_when_torchrun_launches_the_stages(tmp_path):
    project = Project(tmp_path / "project")
    project.set(SHORT)
    project.set({stage: {"epochs": 2} for stage in ("teacher", "student")})
    project.environment["TAILOR_LAUNCH"] = "torchrun --standalone --nproc-per-node 2"
    project.environment["OMP_NUM_THREADS"] = "1"
    project.commit()
    done = project.run("dvc", "repro", "student")
    for stage in ("teacher", "student"):
        # Only rank 0 prints, and every image of the validation split was evaluated once.
        assert len([line for line in done.stdout.splitlines() if line.startswith(f"{stage}  epoch")]) == 2
        records = (project.root / f"artifacts/{stage}/metrics.jsonl").read_text().splitlines()
        counted = json.loads(records[-1])["validation_accuracy"] * 100
        assert counted == pytest.approx(round(counted)), "the digits' validation split holds 100 images"
