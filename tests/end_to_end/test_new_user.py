"""A new user follows docs/own-images.md to the letter: 200 images in ten classes, to a report and a served answer."""

from __future__ import annotations

import csv
import io
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.end_to_end.project import SHORT, Project
from tests.test_docs import ROOT, commands

pytestmark = pytest.mark.end_to_end

SIZES = [60, 40, 28, 20, 15, 12, 9, 7, 5, 4]
# What costs time alone; everything else stays as init chose it.
QUICK = {part: {**SHORT[part], "epochs": 2} for part in ("teacher", "student")}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A fresh project with scanned digits, 32 pixels, as files in a folder per class."""
    project = Project(tmp_path / "project")
    project.commit()
    scans = load_digits()
    for label, count in enumerate(SIZES):
        folder = project.root / "data/source" / f"digit {label}"
        folder.mkdir(parents=True)
        for place, scan in enumerate(scans.images[scans.target == label][:count]):
            Image.fromarray((scan * 15.9).astype("uint8")).resize((32, 32)).save(folder / f"{place}.png")
    return project


def served(project: Project, serve: list[str], ask: list[str]) -> str:
    """What a command prints while `tailor serve` runs beside it on ports of its own."""
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    with subprocess.Popen(
        [*serve, *ports], cwd=project.root, env=project.environment, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            ready = next(line for line in server.stdout or [] if line.startswith("ready "))
            return project.run(*ask, "--url", ready.split()[1]).stdout
        finally:
            server.terminate()
            server.communicate(timeout=60)


def test_the_page_leads_from_a_folder_of_images_to_a_report_and_served_answers(project: Project) -> None:
    page = [command.split() for command in commands(ROOT / "docs/own-images.md")]
    assert [command[:3] for command in page] == [
        ["tailor", "init", "data/source"], ["tailor", "data", "check"], ["dvc", "repro"],
        ["tailor", "serve"], ["tailor", "predict", "data/source"],
    ]  # fmt: skip
    init, check, repro, serve, predict = page
    assert "imbalance factor 15.0" in project.run(*init).stdout
    project.set(QUICK)
    assert "right" in project.run(*check).stdout
    project.run(*repro)
    assert (project.root / "artifacts/evaluation/report.html").stat().st_size > 1000
    rows = list(csv.DictReader(io.StringIO(served(project, serve, predict))))
    assert len({row["image"] for row in rows}) == sum(SIZES)
    assert {row["class"] for row in rows} <= {f"digit {label}" for label in range(10)}
