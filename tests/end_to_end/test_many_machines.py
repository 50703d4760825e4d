"""Distributed training on several hosts: torchrun on two nodes and a Ray Train job give the same network."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import safetensors.torch
import torch
import yaml

import pipeline.prior
import pipeline.split
from pipeline.commands.app import main
from pipeline.deploy import ray_train
from pipeline.params import load_params
from pipeline.shared.errors import ParamsError, StageError
from serving.shared.ports import choose_ports
from tests.support.project import Project

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("torchrun")]

WEIGHTS = Path("artifacts/teacher/model.safetensors")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A project with a finished split and prior, and a training of one epoch with four batches."""
    project = Project(tmp_path_factory.mktemp("machines") / "project")
    project.environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    # Inherited by all processes of a command, to identify the ones that remain.
    project.environment["TAILOR_TEST"] = str(project.root)
    path = project.root / "params.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["device"] = "cpu"
    content["teacher"] |= {"epochs": 1, "batch_size": 64, "backbone": "resnet20"}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with contextlib.chdir(project.root):
        pipeline.split.run(load_params())
        pipeline.prior.run(load_params())
    return project


def trained(project: Project) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(project.root / WEIGHTS)


@pytest.fixture(scope="module")
def by_torchrun(project) -> dict[str, torch.Tensor]:
    """Train the teacher on two nodes of one process each on loopback; return its weights."""
    port = choose_ports("127.0.0.1", {"--rdzv-endpoint": 0})["--rdzv-endpoint"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
        "--rdzv-id", "tailor", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1",
    ]  # fmt: skip
    nodes = [
        subprocess.Popen(
            [*command, "--node-rank", str(rank), "-m", "pipeline.teacher"], cwd=project.root, env=project.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=400)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    # Only rank 0 prints.
    assert sum(text.count("teacher  epoch 1/1") for text in outputs) == 1
    return trained(project)


def test_two_nodes_of_torchrun_train_one_network(by_torchrun):
    assert all(torch.isfinite(value).all() for value in by_torchrun.values())


def test_a_ray_job_of_two_workers_trains_the_network_that_torchrun_does_and_leaves_no_process(project, by_torchrun):
    before = {process.pid for process in psutil.process_iter()}
    (project.root / WEIGHTS).unlink()
    done = project.run(
        "python", "-m", "pipeline.commands", "ray-train", "--workers", "2", "-m", "pipeline.teacher", timeout=540
    )
    # Only the stage's own output.
    first, last = done.stdout.splitlines()
    assert first.startswith("teacher  epoch 1/1  loss") and last.startswith("teacher: 1 epoch, loss")
    by_ray = trained(project)
    assert by_ray.keys() == by_torchrun.keys()
    for name, value in by_torchrun.items():
        assert torch.allclose(by_ray[name].double(), value.double(), rtol=1e-4, atol=1e-6), name
    assert not (project.root / "artifacts/.ray").exists()
    # The last processes exit when they detect that the head has exited.
    deadline = time.monotonic() + 60
    while remaining := started_by(project, before):
        assert time.monotonic() < deadline, remaining
        time.sleep(0.5)


def started_by(project: Project, before: set[int]) -> list[str]:
    """Return the names of processes that remain of a command of the project, by their inherited environment."""
    return [
        entry.info["name"] for entry in psutil.process_iter(["name", "environ"])
        if entry.pid not in before and (entry.info["environ"] or {}).get("TAILOR_TEST") == str(project.root)
    ]  # fmt: skip


def test_misuse_is_reported_before_ray_is_imported(project, capsys, monkeypatch):
    monkeypatch.chdir(project.root)
    for arguments, message in (
        (["evaluate"], "Invalid value for 'stage'"),
        (["-m", "pipeline.export"], "stage is 'export'; expected one of teacher, student"),
        (["teacher", "--workers", "0"], "Invalid value for '--workers'"),
    ):
        assert main(["ray-train", *arguments]) == 2 and message in capsys.readouterr().err
    Path("bad.yaml").write_text(Path("params.yaml").read_text().replace("epochs: 1", "epochs: 0"))
    assert main(["ray-train", "teacher", "--params", "bad.yaml"]) == 2
    assert "teacher.epochs is 0" in capsys.readouterr().err
    assert "ray" not in sys.modules


def test_the_error_of_a_worker_is_raised_instead_of_rays():
    class Failed(Exception):
        worker_failures: ClassVar = {1: ParamsError("teacher.batch_size is 63"), 0: RuntimeError("a peer is gone")}

    assert ray_train.worker_error(Failed()) is Failed.worker_failures[1]
    lost = ray_train.worker_error(RuntimeError("a node\nis gone"))
    assert isinstance(lost, StageError) and str(lost).startswith("Ray lost the workers: a node is gone")
