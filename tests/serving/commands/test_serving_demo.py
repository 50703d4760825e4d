"""`tailor demo`: real server, sample images, a table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, Release, picture


def run_demo(repository: Path, samples: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "COLUMNS": "120"}
    command = [
        sys.executable,
        "-m",
        "serving.commands",
        "demo",
        "--repository",
        str(repository),
        "--samples",
        str(samples),
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def choose(release: Release, differing: bool) -> list[int]:
    """Choose pictures whose best class depends, or does not depend, on the prior."""
    log_prior = np.array(release.manifest.log_prior)
    seeds = []
    for seed in range(200):
        balanced = release.probabilities([picture(seed)], 0.0)[0].argmax()
        trained = release.probabilities([picture(seed)], log_prior)[0].argmax()
        if (balanced != trained) == differing:
            seeds.append(seed)
    return seeds[:3]


def write_samples(folder: Path, seeds: list[int]) -> Path:
    folder.mkdir()
    rows = [f"{seed}.png,{CLASSES[seed % len(CLASSES)]}" for seed in seeds]
    (folder / "samples.csv").write_text("file,label\n" + "\n".join(rows) + "\n")
    for seed in seeds:
        (folder / f"{seed}.png").write_bytes(picture(seed))
    return folder


@pytest.mark.end_to_end
def test_demo_marks_images_whose_prediction_depends_on_the_prior(
    repository: Path, release: Release, tmp_path: Path
) -> None:
    seeds = choose(release, differing=True)[:1] + choose(release, differing=False)
    ended = run_demo(repository, write_samples(tmp_path / "samples", seeds))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("≠") == 1
    assert "HTTP and gRPC agree on 4 images; the prior changes the answer for 1" in ended.stdout
    (seed,), log_prior = seeds[:1], np.array(release.manifest.log_prior)
    balanced, trained = (
        int(release.probabilities([picture(seed)], prior)[0].argmax() == seed % len(CLASSES))
        for prior in (0, log_prior)
    )
    assert f"Of these 1, balanced is right for {balanced}, train for {trained}" in ended.stdout
    assert "it shows what the prior does, not how accurate the model is" in ended.stdout
    assert ended.stdout.rstrip().endswith("The server was stopped cleanly.")


@pytest.mark.end_to_end
def test_demo_reports_that_the_prior_changes_no_prediction(repository: Path, release: Release, tmp_path: Path) -> None:
    ended = run_demo(repository, write_samples(tmp_path / "samples", choose(release, differing=False)))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "the prior changes the answer for 0.\nNo answer changes here, only the probabilities" in ended.stdout


@pytest.mark.slow
def test_the_error_of_invalid_samples_names_the_file_and_the_problem(repository: Path, tmp_path: Path) -> None:
    for content, message in (
        (None, "samples.csv: No such file or directory; run `dvc repro evaluate`"),
        ("name,class\na.png,ant\n", "expected file and label"),
        ("file,label\n", "lists no image"),
        ("file,label\na.png\n", "line 2 lacks a file or a label"),
    ):
        if content is not None:
            (tmp_path / "samples.csv").write_text(content)
        ended = run_demo(repository, tmp_path)
        assert ended.returncode == 2
        assert message in ended.stderr
        assert ended.stderr.count("\n") == 1
