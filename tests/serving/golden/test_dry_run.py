"""Dry run of golden requests in ONNX Runtime: unreadable, wrong, slow and crashing graphs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import write_export

from serving.golden import dry_run as dry_runs
from serving.repository import release as releases
from serving.shared.errors import RepositoryError


@pytest.mark.slow
def test_dry_run_refuses_a_graph_that_onnx_runtime_cannot_read(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    found = releases.find_releases(root)[0]
    (root / "student" / "1" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(RepositoryError, match=r"model\.onnx: ONNX Runtime cannot run it"):
        dry_runs.dry_run(root, [found], timeout=60)


@pytest.mark.slow
def test_dry_run_refuses_a_graph_with_other_answers_than_the_golden_ones(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    found = releases.find_releases(root)[0]
    write_export(tmp_path / "export", version=2)
    shutil.copyfile(tmp_path / "export" / "student.onnx", root / "student" / "1" / "model.onnx")
    with pytest.raises(RepositoryError, match=r"a golden request is answered wrongly"):
        dry_runs.dry_run(root, [found], timeout=60)


def test_dry_run_that_takes_too_long_is_ended(repository: Path) -> None:
    with pytest.raises(RepositoryError, match=r"model\.onnx: ONNX Runtime did not run .* within 0\.01 s"):
        dry_runs.dry_run(repository, releases.find_releases(repository), timeout=0.01)


@pytest.mark.slow
def test_graph_that_crashes_onnx_runtime_crashes_no_other_process(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "onnxruntime"  # fake package that crashes, like the library on some graphs
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RepositoryError, match=r"model\.onnx: it crashed ONNX Runtime with signal 11"):
        dry_runs.dry_run(repository, releases.find_releases(repository), timeout=60)
