"""PREFECT_API_URL of an unreachable server: each command that needs it fails with one line and starts nothing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serving.repository.writer import write_repository
from serving.triton.storage.logit_log import classes_sha256
from tests.serving.conftest import CLASSES, write_export
from tests.support.logging_process import opened
from tests.support.project import ROOT

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("prefect away")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, a release, and logged logits whose class prior differs strongly from training's."""
    root = tmp_path_factory.mktemp("away")
    shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")
    manifest = write_export(root / "export", 1)
    write_repository(root / "export", root / "artifacts/repository")
    about = {
        "tailor_logits": "1",
        "version": str(manifest.version),
        "student_sha256": manifest.files["student.onnx"],
        "classes_sha256": classes_sha256(manifest.classes),
    }
    log, _ = opened(root / "artifacts/logits", len(CLASSES), about=about)
    random = np.random.default_rng(0)
    rare = np.eye(len(CLASSES))[random.integers(3, 5, 200)] * 6.0
    log.offer(random.integers(0, 256, (200, 3, 2, 2), dtype=np.uint8), rare)
    log.close()
    return root


@pytest.mark.parametrize(
    "arguments",
    [["retrain"], ["schedule", "--cron", "0 3 * * *", "--port", "0"], ["drift", "--retrain-above", "0"]],
    ids=["retrain", "schedule", "drift"],
)
@pytest.mark.fault_case("prefect-unreachable")
def test_an_unreachable_server_is_named_in_one_line_and_no_process_is_started(
    project: Path, arguments: list[str]
) -> None:
    with socket.socket() as closed:  # bound but not listening, so that no other process takes the port
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/api"
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.commands", *arguments],
            cwd=project,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": url},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    if arguments[0] == "drift":  # it prints the estimate before it requests a run
        assert any(line.startswith("tailor: starting a retraining: distance") for line in lines[:-1])
        lines = lines[-1:]
    (line,) = lines
    assert (
        line.startswith(f"tailor: PREFECT_API_URL is '{url}', where no usable Prefect server responds (")
        and "Connection refused" in line
    )
    assert "start it, correct PREFECT_API_URL, or unset it" in line
    assert "Traceback" not in done.stderr
    assert not (project / ".prefect/server.log").exists() and not (project / "artifacts/retrain").exists()
